"""report.html: one file with the pictures of a run. rollout.gif: truth and closed-loop prediction side by side."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import matplotlib
import numpy as np
import torch
from torch import Tensor

from mfwm_kernels import video_pyramid

from .data import Clips, Replay, split_levels
from .evaluation import CONTEXT, names_of, rollout_steps, rolls
from .model import WorldModel
from .run_log import read_log
from .training import load_model

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
img { max-width: 100%; } table { border-collapse: collapse; } td, th { padding: .25rem .8rem; text-align: right; }
th { border-bottom: 1px solid #999; font-weight: 600; } td:first-child, th:first-child { text-align: left; }
p.note { color: #57606a; }
"""


def write_report(run: Path, *, seed: int = 0) -> Path:
    """Write report.html and rollout.gif beside metrics.json; returns the report's path."""
    run = Path(run)
    metrics = json.loads((run / "metrics.json").read_text())
    model, config, _ = load_model(run)
    replay = Replay(config.data)
    _, held_out = split_levels(replay, config.held_out, seed=config.seed)
    source = Clips(replay, config.clip, episodes=held_out, within_episode=True)
    candidates = source.batch(
        np.random.default_rng(seed + 1).choice(len(source), size=min(32, len(source)), replace=False)
    )
    # The liveliest of a few clips: a clip in which nothing moves shows nothing.
    motion = candidates["video"].float().diff(dim=1).abs().mean(dim=(1, 2, 3, 4))
    order = motion.argsort(descending=True)[:3]
    clips = {name: value[order] for name, value in candidates.items()}

    horizons = config.model.heads.horizons
    sections = [
        ("Prediction against persistence", table(metrics), "Held-out levels, each horizon at its own resolution."),
        ("Loss", picture(loss_curves(read_log(run / "log.jsonl"), names_of(horizons))), ""),
        ("One position, all horizons", picture(strip(model, clips)), "Held-out level; far targets are smaller."),
    ]
    if rolls(horizons):
        seen, actions, steps = clips["video"][:, :CONTEXT], clips["actions"], rollout_steps(clips["video"])
        (truth,) = video_pyramid(clips["video"][:, : CONTEXT + steps], (1,), dtype=torch.float32)
        rolled = torch.cat([truth[:, :CONTEXT], model.rollout(seen, actions, steps)], dim=1)
        write_gif(run / "rollout.gif", truth, rolled)
        sections += [
            (
                "Closed-loop rollout",
                picture(rollout_strip(truth, rolled)) + embedded_gif(run / "rollout.gif"),
                f"{CONTEXT} real frames, then the model's own, fed back with the real actions. Upper row: truth.",
            ),
            (
                "PSNR against steps ahead",
                picture(rollout_curve(metrics)),
                "Closed loop, mean over all evaluated clips.",
            ),
        ]
    body = "".join(
        f"<h2>{html.escape(title)}</h2>{content}" + (f'<p class="note">{html.escape(note)}</p>' if note else "")
        for title, content, note in sections
    )
    env = metrics["data"].get("env", "")
    intro = (
        f"{env}: {metrics['parameters'] / 1e6:.1f} million parameters, {metrics['steps']} steps at "
        f"{metrics['frames_per_second']:.0f} frames/s on {metrics['device']}. "
        f"{metrics['clips']} clips of {metrics['held_out_levels']} unseen levels."
    )
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>mfwm: {html.escape(env)}</title>"
        f"<style>{STYLE}</style><h1>Multi-frame world model</h1><p>{html.escape(intro)}</p>{body}</html>"
    )
    path = run / "report.html"
    path.write_text(page)
    return path


def table(metrics: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{k}</td><td>{metrics['psnr'][k]:.2f}</td><td>{metrics['persistence_psnr'][k]:.2f}</td>"
        f"<td>{metrics['psnr'][k] - metrics['persistence_psnr'][k]:+.2f}</td>"
        f"<td>{metrics['psnr_gain_95'][k][0]:+.2f} to {metrics['psnr_gain_95'][k][1]:+.2f}</td>"
        f"<td>{metrics['delta_psnr_by_horizon'][k]:+.2f}</td></tr>"
        for k in metrics["psnr"]
    )
    controlled = ""
    if "delta_psnr" in metrics:
        low, high = metrics["delta_psnr_95"]
        controlled = (
            f"<p>After {metrics['delta_psnr_step']} closed-loop steps, true minus shuffled actions: "
            f"{metrics['delta_psnr']:+.2f} dB ({low:+.2f} to {high:+.2f}).</p>"
        )
    return (
        "<table><tr><th>frames ahead</th><th>PSNR, dB</th><th>persistence</th><th>gain</th><th>95% interval</th>"
        f"<th>true minus shuffled actions</th></tr>{rows}</table>{controlled}"
    )


def loss_curves(log: list[dict[str, Any]], names: list[str]) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 3.2))
    steps = [row["step"] for row in log]
    losses = np.array([row["per_horizon"] for row in log])
    for i, name in enumerate(names):
        axes.plot(steps, smooth(losses[:, i]), label=f"n + {name}")
    axes.set(xlabel="step", ylabel="mean squared error", yscale="log")
    axes.legend(frameon=False)
    return figure


def smooth(values: np.ndarray, window: int = 10) -> np.ndarray:
    """Mean of the last `window` values."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def strip(model: WorldModel, clips: dict[str, Tensor]) -> Figure:
    """Truth and prediction per horizon, from one position of one clip."""
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


def rollout_strip(truth: Tensor, rolled: Tensor) -> Figure:
    columns = range(CONTEXT - 1, truth.shape[1], 2)
    figure, axes = plt.subplots(2, len(columns), figsize=(1.5 * len(columns), 3.4), squeeze=False)
    for place, frame in enumerate(columns):
        ahead = frame - CONTEXT + 1
        show(axes[0, place], truth[0, frame], f"+{ahead}" if ahead else "last seen")
        show(axes[1, place], rolled[0, frame], "")
    return figure


def rollout_curve(metrics: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 3.2))
    steps = range(1, len(metrics["rollout_psnr"]) + 1)
    axes.plot(steps, metrics["rollout_psnr"], marker="o", label="model")
    axes.plot(steps, metrics["persistence_rollout_psnr"], marker="o", label="last frame kept")
    axes.set(xlabel="steps ahead", ylabel="PSNR, dB")
    axes.legend(frameon=False)
    return figure


def show(axes: Any, picture_CHW: Tensor, title: str) -> None:
    axes.imshow(as_bytes(picture_CHW), interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def as_bytes(picture_CHW: Tensor) -> np.ndarray:
    """-1..1 -> uint8 [H, W, 3]."""
    return ((picture_CHW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def picture(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def embedded_gif(path: Path) -> str:
    return f'<img alt="" src="data:image/gif;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def write_gif(path: Path, truth: Tensor, rolled: Tensor, enlarge: int = 3) -> None:
    """Clips side by side; truth above, the model's rollout below."""
    frames = []
    for t in range(truth.shape[1]):
        rows = [np.concatenate([as_bytes(clip[t]) for clip in clips], axis=1) for clips in (truth, rolled)]
        frame = np.concatenate([rows[0], np.full((2, rows[0].shape[1], 3), 255, np.uint8), rows[1]])
        frames.append(frame.repeat(enlarge, 0).repeat(enlarge, 1))
    iio.imwrite(path, frames, extension=".gif", duration=200, loop=0)
