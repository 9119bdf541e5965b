"""Writes report.html, one file with the pictures of a run, and rollout.gif, truth above closed-loop rollouts.

Where the run can be rolled out, the report links to play.html beside it, a page of recorded walks (mfwm play --export).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mfwm_kernels import arguments as check
from mfwm_kernels import video_pyramid

from ..models.distributions import DISTRIBUTIONS
from ..models.rollouts import rollout
from ..models.world_model import WorldModel
from ..training.checkpoints import write_atomically
from ..training.run_config import parsed, read
from ..training.run_log import read_log
from ..training.world_model import TrainingConfig, load_model
from .closed_loop import CONTEXT
from .held_out import HeldOut
from .page import STYLE, as_table, between, embedded_gif, picture, plt
from .report_rollouts import Section, rollout_sections
from .tokens import TOP_K, Decoder, check_tokens, decoder_of

# How the tokens of a rollout are chosen: greedily, which can freeze, and sampled.
SAMPLINGS: list[dict[str, Any]] = [{}, {"temperature": 1.0, "top_k": TOP_K}]

# Keys of metrics.json that every report needs.
REQUIRED = ("data", "parameters", "steps", "frames_per_second", "device", "data_wait", "clips", "held_out_levels")
# And those with rollouts.
OF_ROLLOUTS = ("rollout_steps", "gain", "gain_95", "gain_zero_step")


def write_report(
    run: Path,
    *,
    data: str | Path | None = None,
    pixels: str | Path | None = None,
    tokenizer: Path | None = None,
    seed: int = 0,
) -> Path:
    """Write report.html, rollout.gif and play.html beside metrics.json; returns the report's path.

    data, pixels, tokenizer: as in evaluate.
    """
    run = Path(run)
    check.integer("seed", seed, least=0)
    config, digest = read(TrainingConfig, run)
    check_tokens(config.model, pixels=pixels, tokenizer=tokenizer)
    path = run / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: evaluate the run first")
    metrics = parsed(path.read_bytes(), str(path))
    required = (*REQUIRED, *(OF_ROLLOUTS if "rollout_psnr" in metrics else ()))
    if missing := [name for name in required if name not in metrics]:
        raise ValueError(
            f"{path} must hold what evaluate writes, but it lacks {', '.join(missing)}: evaluate the run again"
        )
    steps = metrics.get("rollout_steps", 0)
    draw = np.random.default_rng(seed + 1)
    held_out = HeldOut(config, digest, data, length=config.clip, most=CONTEXT + steps, count=32, draw=draw)
    model, _, _ = load_model(run)
    decoder = None
    if model.tokens:
        decoder = decoder_of(
            held_out.replay,
            held_out.clips.length,
            held_out.episodes,
            torch.device("cpu"),
            pixels=pixels,
            tokenizer=tokenizer,
        )
    candidates = held_out.clips.batch(held_out.chosen)
    if decoder is not None:
        candidates["pixels"] = decoder.pixels(held_out.chosen)
    # The clips with the most motion: a clip in which nothing moves shows nothing.
    motion = candidates["pixels" if decoder else "video"].float().diff(dim=1).abs().flatten(1).mean(1)
    order = motion.argsort(descending=True)[:3]
    clips = {name: value[order] for name, value in candidates.items()}

    sections: list[Section] = []
    if "rollout_psnr" in metrics:
        sections.append(rollout_pictures(run, model, clips, steps, decoder, seed))
        write_walks(run, data=data, pixels=pixels, tokenizer=tokenizer, seed=seed)
    names, log = config.model.heads.horizons.labels, read_log(run / "log.jsonl")
    if model.tokens:
        if "bits_per_token" in metrics:
            sections.append(("Prediction of tokens", token_table(metrics), TOKEN_NOTE))
        losses = loss_curves(log, names, "cross-entropy, nats")
    else:
        first = {name: value[:, : config.clip] for name, value in clips.items()}
        note = "Held-out levels, each horizon at its own resolution."
        sections += [
            ("One position, all horizons", picture(strip(model, first)), "Held-out level; far targets are smaller."),
            ("Prediction against persistence", table(metrics), note),
        ]
        if "nll" in metrics:
            sections.append(("Predicted distributions", likelihood_table(metrics), LIKELIHOOD_NOTE))
        if "latent_best_psnr" in metrics:
            sections.append(("Drawn latents", latent_table(metrics), LATENT_NOTE))
        losses = loss_curves(log, names, "loss", config.model.heads.kinds)
    sections += [*rollout_sections(run, metrics), ("Loss", picture(losses), "")]
    body = "".join(
        f"<h2>{html.escape(title)}</h2>{content}" + (f'<p class="note">{html.escape(note)}</p>' if note else "")
        for title, content, note in sections
    )
    env = metrics["data"].get("env", "")
    intro = (
        f"{env}: {metrics['parameters'] / 1e6:.1f} million parameters, {metrics['steps']} steps at "
        f"{metrics['frames_per_second']:.0f} frames/s on {metrics['device']}, "
        f"{metrics['data_wait']:.1%} of the time waiting for data. "
        f"{metrics['clips']} clips of {metrics['held_out_levels']} unseen levels."
    )
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>mfwm: {html.escape(env)}</title>"
        f"<style>{STYLE}</style><h1>Multi-frame world model</h1><p>{html.escape(intro)}</p>"
        f"{WALKS if 'rollout_psnr' in metrics else ''}{body}</html>"
    )
    path = run / "report.html"
    path.write_text(page)
    return path


WALKS = (
    '<p><a href="play.html">Walks through the model</a>, recorded: what every horizon expects at each step, and what '
    "it became. <code>mfwm play</code> puts the keys in your hands.</p>"
)
WALK_STEPS = 48


def write_walks(run: Path, *, seed: int, **places: Any) -> None:
    """Write play.html, the page of recorded walks, beside the report."""
    # Imported here, because mfwm.play reads what evaluation knows of a run.
    from ..play.export import page_of
    from ..play.world import load_world

    page = page_of(load_world(run, **places), seed=seed, steps=WALK_STEPS)
    write_atomically(run / "play.html", page.encode())


def rollout_pictures(
    run: Path, model: WorldModel, clips: dict[str, Tensor], steps: int, decoder: Decoder | None, seed: int
) -> Section:
    """The section on closed-loop rollouts of clips, and rollout.gif, which it shows."""
    seen, actions = clips["video"][:, :CONTEXT], clips["actions"]
    (truth,) = video_pyramid(clips["pixels" if decoder else "video"][:, : CONTEXT + steps], (1,), dtype=torch.float32)
    rows = [truth]
    for sampling in SAMPLINGS if decoder else SAMPLINGS[:1]:
        generator = torch.Generator().manual_seed(seed)
        rolled = rollout(model, seen, actions, steps, **sampling, generator=generator)
        if decoder is not None:
            rolled = decoder.pictures(torch.cat([seen, rolled], dim=1), CONTEXT)
        rows.append(torch.cat([truth[:, :CONTEXT], rolled], dim=1))
    write_gif(run / "rollout.gif", rows)
    note = f"{CONTEXT} real frames, then the model's own, fed back with the real actions. Upper row: truth."
    if decoder:
        note += f" Next row: the most likely tokens; last row: tokens sampled from the {TOP_K} most likely."
    content = embedded_gif(run / "rollout.gif") + picture(rollout_strip(rows))
    return "Closed-loop rollout", content, note


def table(metrics: dict[str, Any]) -> str:
    controlled = "delta_psnr_by_horizon" in metrics
    header = ["frames ahead", "PSNR, dB", "persistence", "gain", "95% interval"]
    rows = [
        [
            k,
            f"{metrics['psnr'][k]:.2f}",
            f"{metrics['persistence_psnr'][k]:.2f}",
            f"{metrics['psnr'][k] - metrics['persistence_psnr'][k]:+.2f}",
            between(metrics["psnr_gain_95"][k], "+.2f"),
            *([f"{metrics['delta_psnr_by_horizon'][k]:+.2f}"] if controlled else []),
        ]
        for k in metrics["psnr"]
    ]
    header += ["true minus shuffled actions"] if controlled else []
    return as_table(header, rows) + enlarged_sentence(metrics) + controlled_sentence(metrics)


def enlarged_sentence(metrics: dict[str, Any]) -> str:
    return "".join(
        f"<p>The small prediction of n + {k}, plainly enlarged, has {plain:.2f} dB; the upsampler gains "
        f"{between(metrics['upsampler_gain_95'][k], '+.2f')} dB on it.</p>"
        for k, plain in metrics.get("enlarged_psnr", {}).items()
    )


TOKEN_NOTE = (
    "Held-out levels. Bits: -log2 of the probability that a cell of a horizon gives to an id it covers. Persistence: "
    "the share of ids that do not change."
)


def token_table(metrics: dict[str, Any]) -> str:
    labels = {
        "bits_per_token": ("bits per token", ".2f"),
        "bits_per_token_95": ("95% interval", ".2f"),
        "bits_per_token_shuffled_actions": ("with shuffled actions", ".2f"),
        "bits_per_token_for_actions_95": ("increase, 95% interval", "+.2f"),
        "accuracy": ("accuracy", ".1%"),
        "persistence_accuracy": ("persistence", ".1%"),
        "accuracy_gain_95": ("gain, 95% interval", "+.1%"),
    }
    labels = {name: label for name, label in labels.items() if name in metrics}
    rows = []
    for k in metrics["bits_per_token"]:
        cells = [(metrics[name][k], form) for name, (_, form) in labels.items()]
        rows.append([k, *(between(v, form) if isinstance(v, list) else f"{v:{form}}" for v, form in cells)])
    return as_table(["frames ahead", *(label for label, _ in labels.values())], rows) + controlled_sentence(metrics)


LIKELIHOOD_NOTE = (
    "Held-out levels. Negative log-likelihood of the true values, in nats per element of a frame; lower is better. One "
    "scale: the same means with one scale for all elements of a horizon, fitted to the other half of the held-out "
    "levels. Coverage: the share of true values inside the central interval of 50% and of 90%."
)


def likelihood_table(metrics: dict[str, Any]) -> str:
    header = ["frames ahead", "nats per element", "95% interval", "one scale", "gain, 95% interval"]
    header += ["coverage of 50%", "95% interval", "coverage of 90%", "95% interval"]
    rows = []
    for k in metrics["nll"]:
        row = [k, f"{metrics['nll'][k]:+.3f}", between(metrics["nll_95"][k], "+.3f")]
        if metrics["nll_one_scale"][k] is None:
            row += ["undefined", ""]
        else:
            row += [f"{metrics['nll_one_scale'][k]:+.3f}", between(metrics["nll_gain_95"][k], "+.3f")]
        for name in ("coverage_50", "coverage_90"):
            row += [f"{metrics[name][k]:.1%}", between(metrics[f"{name}_95"][k], ".1%")]
        rows.append(row)
    return as_table(header, rows)


LATENT_NOTE = (
    "Held-out levels, PSNR in dB. Best: of the draws of each frame, the one nearest to what happened. Mean: of all "
    "draws' squared errors. Gain: of the best over the prediction, which takes the mean of the prior. Divergence: KL "
    "from the posterior, which sees the target, to the prior; near 0 the latent is not used."
)


def latent_table(metrics: dict[str, Any]) -> str:
    header = ["frames ahead", "prediction", f"best of {metrics['latent_samples']}", "gain, 95% interval", "mean"]
    rows = []
    for k in metrics["latent_best_psnr"]:
        row = [k, *(f"{metrics[f'latent_{name}_psnr'][k]:.2f}" for name in ("prediction", "best"))]
        row += [between(metrics["latent_best_gain_95"][k], "+.2f"), f"{metrics['latent_draws_psnr'][k]:.2f}"]
        rows.append([*row, f"{metrics['latent_kl'][k]:.2f}", between(metrics["latent_kl_95"][k], ".2f")])
    return as_table([*header, "divergence, nats", "95% interval"], rows)


def controlled_sentence(metrics: dict[str, Any]) -> str:
    if "delta_psnr" not in metrics:
        return ""
    return (
        f"<p>After {metrics['delta_psnr_step']} closed-loop steps, true minus shuffled actions: "
        f"{metrics['delta_psnr']:+.2f} dB ({between(metrics['delta_psnr_95'], '+.2f')}).</p>"
    )


def loss_curves(log: list[dict[str, Any]], names: Sequence[str], label: str, kinds: Sequence[str] = ()) -> Figure:
    """Losses that are positive, on a logarithmic axis, and beside them likelihoods, which need not be."""
    kinds = kinds or ("",) * len(names)
    panels = [
        (title, scale, chosen)
        for title, scale, drawn in ((label, "log", False), ("negative log-likelihood, nats", "linear", True))
        if (chosen := [i for i, kind in enumerate(kinds) if (kind in DISTRIBUTIONS) == drawn])
    ]
    figure, axes_of = plt.subplots(1, len(panels), figsize=(max(8, 5 * len(panels)), 3.2), squeeze=False)
    steps = [row["step"] for row in log]
    # A loss that is not finite is null in the log.
    losses = np.array([row["per_horizon"] for row in log], float)
    for axes, (title, scale, chosen) in zip(axes_of[0], panels, strict=True):
        for i in chosen:
            axes.plot(steps, smooth(losses[:, i]), label=f"n + {names[i]}" + (f", {kinds[i]}" if kinds[i] else ""))
        axes.set(xlabel="step", ylabel=title, yscale=scale)
        axes.legend(frameon=False)
    figure.tight_layout()
    return figure


def smooth(values: np.ndarray, window: int = 10) -> np.ndarray:
    """Running mean of the last `window` values."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def strip(model: WorldModel, clips: dict[str, Tensor]) -> Figure:
    """Truth and prediction of every horizon, at one position of one clip."""
    horizons = model.config.heads.horizons
    pyramid = video_pyramid(clips["video"], horizons.factors, dtype=torch.float32)
    predictions = model.predict(clips["video"], clips["actions"], clips["segment_ids"])
    position = max(0, min(model.config.context, clips["video"].shape[1] - horizons.offsets[-1]) - 1)
    figure, axes = plt.subplots(2, len(horizons) + 1, figsize=(2 * (len(horizons) + 1), 4.3))
    show(axes[0, 0], pyramid[0][0, position], "frame n")
    axes[1, 0].axis("off")
    for i, offset in enumerate(horizons.offsets):
        if position + offset < pyramid[i].shape[1]:
            show(axes[0, i + 1], pyramid[i][0, position + offset], f"n + {offset}: truth")
        show(axes[1, i + 1], predictions[i][0, position], "prediction")
    return figure


def rollout_strip(rows: list[Tensor]) -> Figure:
    """The last frame seen and evenly spaced later ones of the first clip of each of `rows`."""
    columns = range(CONTEXT - 1, rows[0].shape[1], max(2, -(-(rows[0].shape[1] - CONTEXT) // 8)))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(1.5 * len(columns), 1.7 * len(rows)), squeeze=False)
    for column, frame in enumerate(columns):
        ahead = frame - CONTEXT + 1
        title = f"+{ahead}" if ahead else "last seen"
        for line, clips in enumerate(rows):
            show(axes[line, column], clips[0, frame], "" if line else title)
    return figure


def show(axes: Any, picture_CHW: Tensor, title: str) -> None:
    axes.imshow(as_bytes(picture_CHW), interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def as_bytes(picture_CHW: Tensor) -> np.ndarray:
    """uint8 [H, W, 3] from -1..1."""
    return ((picture_CHW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def write_gif(path: Path, rows: list[Tensor], enlarge: int = 3) -> None:
    """Write a GIF with the clips [B, T, 3, H, W] of each of `rows` side by side; the first row is the truth."""
    frames = []
    for t in range(rows[0].shape[1]):
        lines = [np.concatenate([as_bytes(clip[t]) for clip in clips], axis=1) for clips in rows]
        white = np.full((2, lines[0].shape[1], 3), 255, np.uint8)
        frame = np.concatenate([part for line in lines for part in (line, white)][:-1])
        frames.append(frame.repeat(enlarge, 0).repeat(enlarge, 1))
    iio.imwrite(path, frames, extension=".gif", duration=200, loop=0)
