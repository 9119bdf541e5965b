"""mfwm evaluate: how good the predictions are on levels that the model has never seen.

PSNR = 10 log10(2^2 / MSE), with pixels in -1..1 and the MSE over all clips. Everything is compared with persistence,
which repeats the last frame seen. Rollouts are also compared with those of another run, such as one trained on the next
frame only, and rollouts of tokens with the tokenizer's reconstruction of the true frames, their upper bound.
Horizons that predict distributions are measured by the means, and by likelihood and coverage (distributions.py); those
with a latent also by the best of several draws (latents.py).
Intervals are 95% bootstrap intervals over clips; for a difference, both sides are resampled alike.
"""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfwm_kernels import __version__, video_pyramid
from mfwm_kernels import arguments as check
from mfwm_kernels.info import cpu_name

from ..metrics.intervals import check_draw, interval
from ..metrics.lpips import LPIPS
from ..metrics.lpips import SMALLEST as SMALLEST_FOR_LPIPS
from ..metrics.quality import check_size, psnr, squared_error
from ..models.distributions import DISTRIBUTIONS
from ..models.heads_config import HeadsConfig
from ..models.upsampler import enlarged
from ..models.world_model import WorldModel, WorldModelConfig, parameters_of
from ..progress import Progress
from ..training.checkpoints import write_atomically
from ..training.data_identity import resolved
from ..training.run_config import read
from ..training.run_log import column, read_log
from ..training.world_model import TrainingConfig, load_model
from .closed_loop import CONTEXT, action_ratio, can_roll_out, closed_loop, mean_image, rollout_summary, shuffle
from .distributions import likelihood_measures, likelihood_summary
from .held_out import HeldOut, device_for_evaluation, write_metrics
from .jumps import check_jumps, jump_measures, jump_summary
from .latents import SAMPLES, latent_measures, latent_summary
from .positions import objects_of, position_summary, positions, reader_of
from .probes import probe
from .tokens import check_tokens, decoder_of, token_measures, token_summary

# Of rollouts, unless told otherwise.
STEPS = 32

# Measurements of every clip, by name: [clips, K], [clips, steps], [clips, steps, objects], or [clips] its level.
Measures = dict[str, np.ndarray]


def evaluate(
    run: Path,
    *,
    data: str | Path | None = None,
    pixels: str | Path | None = None,
    tokenizer: Path | None = None,
    against: Path | None = None,
    lpips: Path | None = None,
    reader: Path | None = None,
    probes: bool = True,
    jumps: bool = False,
    steps: int = STEPS,
    clips: int = 96,
    samples: int = SAMPLES,
    temperature: float = 0.0,
    batch: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a run on its held-out levels. Returns the metrics, and writes them into the run as metrics.json, with
    the measures of every clip in clips.npz. A metric that is undefined, such as a correlation with a constant, is None.

    Args:
        data: where the run's data set is, if it was moved.
        pixels, tokenizer: likewise, for a set that mfwm encode wrote, the frames and the tokenizer's run that it names.
        against: another run on the same data, whose rollouts are compared with this one's.
        lpips: a file with the weights of LPIPS, as in mfwm.metrics.lpips; without it LPIPS is not measured.
        reader: a file for the reader of positions, which the evaluations of one data set may share: it is read if it
            exists, else trained on this run's training levels and written.
        probes: whether to fit ridge probes to the hidden state, in sets that hold positions.
        jumps: whether to roll out in jumps along every horizon of offset 2 or more, too.
        steps: of rollouts; fewer if most of the held-out episodes are shorter, as in HeldOut.
        samples: draws of each frame that a horizon with a latent predicts, and of each rollout in jumps.
        temperature: of the tokens, or of a near distribution, that rollouts draw; 0: the most likely ones, the means.
    """
    run = Path(run)
    check_draw(clips=clips, batch=batch, seed=seed)
    check.integer("steps", steps, least=1)
    check.integer("samples", samples, least=1)
    check.number("temperature", temperature, least=0)
    config, digest = read(TrainingConfig, run)
    if config.model.heads.output == "pixels" and can_roll_out(config.model):
        check_size(config.model.frame)
    check_tokens(config.model, pixels=pixels, tokenizer=tokenizer)
    if check.flag("jumps", jumps):
        check_jumps(config.model, config.clip)
    if lpips is not None:
        check_lpips(config.model)
    if against is not None:
        check_comparable(Path(against), config, digest)
    if reader is not None and not Path(reader).parent.is_dir():
        raise FileNotFoundError(f"reader must be in a directory that exists, got {reader}")
    distance = None if lpips is None else LPIPS(lpips)
    path = run / "log.jsonl"
    log = read_log(path)
    rates, seconds, waits = (column(log, name, path) for name in ("frames_per_second", "seconds", "data_wait"))
    draw, most = np.random.default_rng(seed), CONTEXT + steps if can_roll_out(config.model) else 0
    held_out = HeldOut(config, digest, data, length=config.clip, most=most, count=clips, draw=draw)
    length = held_out.clips.length
    replay, device = held_out.replay, device_for_evaluation()
    model, _, step = load_model(run)
    model = model.to(device)
    rival = None if against is None else load_model(Path(against))[0].to(device)
    distance = None if distance is None else distance.to(device)
    decoder = None
    if model.tokens:
        decoder = decoder_of(replay, length, held_out.episodes, device, pixels=pixels, tokenizer=tokenizer)
    pictured = can_roll_out(config.model) and (decoder is not None or not model.tokens)
    if rival is not None and not pictured:
        raise ValueError(
            f"--against compares pictures, but {config.data} was imported without a tokenizer, so its tokens cannot be "
            "decoded"
        )

    shown = replay if decoder is None else decoder.clips.replay
    objects = list(objects_of(shown).values()) if pictured else []
    if reader is not None and not objects:
        raise ValueError(f"reader is for rollouts of sets whose state holds positions in pixels; got {reader}")

    began = time.perf_counter()
    baseline = mean_image(shown, held_out.trained).to(device) if pictured else None
    eye = None
    if objects:
        eye = reader_of(shown, held_out.trained, seed=seed, path=reader).to(device)
    read_out = None
    if probes:
        read_out = probe(model, replay, held_out.trained, held_out.episodes, seed=seed, batch=batch)
    rolled_steps = min(steps, length - CONTEXT)
    generator = torch.Generator(device).manual_seed(seed)
    sampling = {"temperature": temperature, "generator": generator}
    parts: list[Measures] = []
    bar = Progress("evaluate", len(held_out.chosen), "clip", shown=progress)
    for indices in bar.over(held_out.batches(batch), len):
        held = held_out.read(indices, device)
        part: Measures = {"level": replay.episode_level[held["segment_ids"][:, 0].cpu().numpy()]}
        # As in training.
        first = {name: value[:, : config.clip] for name, value in held.items()}
        if not model.tokens:
            part |= open_loop(model, first, samples, generator)
        elif not config.model.masked:
            part |= token_measures(model, first, shuffle(first["actions"]))
        if decoder is not None:
            held["pixels"] = decoder.pixels(indices).to(device)
        if objects:
            held["positions"] = torch.from_numpy(positions(shown, held_out.frames(indices), objects)).to(device)
        if baseline is not None:
            options: dict[str, Any] = {"distance": distance, "decoder": decoder, "sampling": sampling}
            part |= closed_loop(model, held, rolled_steps, baseline, reader=eye, **options)
        if jumps:
            part |= jump_measures(model, held, rolled_steps, samples, generator)
        if rival is not None:
            assert baseline is not None
            rolled = closed_loop(rival, held, rolled_steps, baseline, **options)
            part |= {f"against_{name}": values for name, values in rolled.items() if name.startswith("rollout_")}
        parts.append(part)
    measures = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    compressed = io.BytesIO()
    np.savez_compressed(compressed, **measures)  # type: ignore[arg-type]
    write_atomically(run / "clips.npz", compressed.getvalue())

    metrics = {
        **summary(measures, config.model.heads, seed, controlled=model.action is not None, samples=samples),
        **({"jumps": jump_summary(measures, seed)} if jumps else {}),
        **({} if eye is None else position_summary(measures, eye.objects, seed)),
        **({} if eye is None else {"reader_seen_levels": eye.seen(replay.episode_level[held_out.episodes])}),
        **({} if read_out is None else {"probe": read_out}),
        "steps": step,
        "parameters": parameters_of(model),
        "frames_per_second": float(np.median(rates)),
        "training_seconds": sum(seconds),
        # Share of the training time spent waiting for clips.
        "data_wait": float(np.dot(waits, seconds) / sum(seconds)),
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{cpu_name()}, {torch.get_num_threads()} threads",
        **held_out.summary(),
        "episodes_shorter_than_a_clip": held_out.clips.too_short,
        "data": {
            key: replay.attributes[key] for key in ("env", "package", "package_version") if key in replay.attributes
        },
        "against": None if against is None else str(against),
        "temperature": temperature,
        "evaluation_seconds": time.perf_counter() - began,
        "versions": {"mfwm_kernels": __version__, "torch": torch.__version__},
    }
    return write_metrics(run, metrics)


def check_lpips(config: WorldModelConfig) -> None:
    """ValueError where LPIPS cannot compare the frames. Those behind tokens are checked when their set is opened."""
    if config.heads.output == "pixels" and (config.frame[0] != 3 or min(config.frame[1:]) < SMALLEST_FOR_LPIPS):
        least = f"[3, >= {SMALLEST_FOR_LPIPS}, >= {SMALLEST_FOR_LPIPS}]"
        raise ValueError(f"lpips needs frames of shape {least}, but the run's are {list(config.frame)}")


def check_comparable(run: Path, config: TrainingConfig, digest: str | None) -> None:
    """ValueError if the run given as `against` cannot be rolled out, or has other data or held-out levels.

    digest: of the first run's data set. If either run has none, their paths must be equal.
    """
    other, its_data = read(TrainingConfig, run)
    same = resolved(other.data) == resolved(config.data) if None in (digest, its_data) else digest == its_data
    if not same:
        raise ValueError(f"against must be a run on the same data set: its data is {other.data}, not {config.data}")
    for name in ("held_out", "seed"):
        mine, its = getattr(config, name), getattr(other, name)
        if mine != its:
            raise ValueError(
                f"against must be a run with the same held-out levels: its {name} is {its!r}, not {mine!r}"
            )
    for both in (config.model, other.model):
        if not can_roll_out(both):
            raise ValueError(
                "against compares rollouts, which need a near horizon of offset 1 (masked: 0) and factor 1; got "
                f"{both.heads.horizons}"
            )


def open_loop(model: WorldModel, clips: dict[str, Tensor], samples: int, generator: torch.Generator) -> Measures:
    """Mean squared errors [clips, K] of every horizon, at its own resolution, over the positions that count.

    horizon_enlarged [clips, 1]: where an upsampler computes horizon 0, the error of the small prediction without it,
    each pixel repeated. And likelihood_measures of horizons that predict distributions, latent_measures of those that
    have a latent.
    """
    horizons = model.config.heads.horizons
    pyramid = video_pyramid(clips["video"], horizons.factors, dtype=torch.float32)
    shuffled = shuffle(clips["actions"])
    predictions = model.predict(clips["video"], clips["actions"], clips["segment_ids"])
    predicted_shuffled = model.predict(clips["video"], shuffled, clips["segment_ids"])
    errors: dict[str, list[Tensor]] = {"horizon": [], "horizon_persistence": [], "horizon_shuffled": []}
    truths = []
    for i, offset in enumerate(horizons.offsets):
        end = min(predictions[i].shape[1], pyramid[i].shape[1] - offset)
        truth = pyramid[i][:, offset : offset + end]
        truths.append(truth)
        errors["horizon"].append(squared_error(predictions[i][:, :end], truth))
        errors["horizon_persistence"].append(squared_error(pyramid[i][:, :end], truth))
        errors["horizon_shuffled"].append(squared_error(predicted_shuffled[i][:, :end], truth))
    measures = {name: torch.stack(columns, 1).cpu().numpy() for name, columns in errors.items()}
    if model.heads.upsampler is not None:
        plain = enlarged(predictions[1][:, : truths[0].shape[1]], horizons.factors[1])
        measures["horizon_enlarged"] = squared_error(plain, truths[0])[:, None].cpu().numpy()
    if set(model.config.heads.kinds) & set(DISTRIBUTIONS):
        found = model.distributions(clips["video"], clips["actions"], clips["segment_ids"])
        measures |= likelihood_measures(found, truths)
    if model.heads.latents is not None:
        measures |= latent_measures(model, clips, truths, samples, generator)
    return measures


def summary(measures: Measures, heads: HeadsConfig, seed: int, *, controlled: bool, samples: int) -> dict[str, Any]:
    """The metrics: those of rollouts only if the model can be rolled out, of actions only if it has some."""
    names = heads.horizons.labels

    def by_horizon(values: Any) -> dict[str, Any]:
        return dict(zip(names, np.asarray(values).tolist(), strict=True))

    def gain(errors: np.ndarray, others: np.ndarray) -> list[list[float]]:
        return interval(seed, lambda a, b: psnr(a) - psnr(b), errors, others)

    means = {name: values.mean(0) for name, values in measures.items()}
    metrics: dict[str, Any] = {}
    if "bits" in measures:
        metrics = token_summary(measures, names, seed, controlled=controlled)
    if "horizon" in measures:
        metrics = {
            "psnr": by_horizon(psnr(means["horizon"])),
            "persistence_psnr": by_horizon(psnr(means["horizon_persistence"])),
            "psnr_gain_95": by_horizon(gain(measures["horizon"], measures["horizon_persistence"])),
        }
        if controlled:
            metrics["delta_psnr_by_horizon"] = by_horizon(psnr(means["horizon"]) - psnr(means["horizon_shuffled"]))
            found = action_ratio(measures["horizon_shuffled"], measures["horizon"], seed, "action_ratio")
            metrics |= {name: by_horizon(values) for name, values in found.items()}
    if "horizon_enlarged" in measures:
        plain, upsampled = measures["horizon_enlarged"], measures["horizon"][:, :1]
        metrics |= {
            "enlarged_psnr": {names[0]: float(psnr(plain.mean()))},
            "upsampler_gain_95": {names[0]: gain(upsampled, plain)[0]},
        }
    if "nll" in measures:
        drawn = [(kind, name) for kind, name in zip(heads.kinds, names, strict=True) if kind in DISTRIBUTIONS]
        metrics |= likelihood_summary(measures, [kind for kind, _ in drawn], [name for _, name in drawn], seed)
    if "latent_best" in measures:
        metrics |= latent_summary(measures, [names[i] for i in heads.far], samples, seed)
    if "rollout_mse" in measures:
        metrics |= rollout_summary(measures, seed, controlled=controlled)
    return metrics
