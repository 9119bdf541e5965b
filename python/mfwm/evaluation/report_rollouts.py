"""Sections of a report on closed-loop rollouts: quality, gain, position error and drift, against steps."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .page import as_table, between, picture, plt

Section = tuple[str, str, str]  # title, content, note


def rollout_sections(run: Path, metrics: dict[str, Any]) -> list[Section]:
    """What metrics.json of the run tells about its rollouts beyond their pictures, and what probes read."""
    sections = []
    if "rollout_psnr" in metrics:
        note = f"Closed loop, over {metrics['clips']} clips, with 95% intervals."
        note += f" Dotted: {metrics['against']}." if metrics["against"] else ""
        content = picture(rollout_curves(metrics)) + rollout_table(metrics)
        sections += [
            ("Quality against steps ahead", content, note),
            ("Gain over the baselines", picture(gain_curve(metrics)) + gain_sentence(metrics), GAIN_NOTE),
        ]
    if "jumps" in metrics:
        sections.append(("Rollouts in jumps", jump_table(metrics["jumps"]), JUMP_NOTE))
    if "position_error" in metrics:
        content = picture(position_curves(metrics)) + position_table(metrics)
        sections.append(("Position error of objects", content, POSITION_NOTE))
    if "probe" in metrics:
        sections.append(("What the hidden state holds", probe_table(metrics["probe"]), PROBE_NOTE))
    if metrics.get("drift", {}).get("steps"):
        with np.load(run / "clips.npz", allow_pickle=False) as measures:
            points = picture(drift_points(measures["drift"], measures["rollout_mse"]))
        sections.append(("Drift signal", points + drift_sentence(metrics["drift"]), DRIFT_NOTE))
    return sections


def shown_steps(count: int) -> list[int]:
    """1, 2, 4, 8 ... and the last of so many steps."""
    return sorted({2**i for i in range(count.bit_length())} | {count})


def rollout_table(metrics: dict[str, Any]) -> str:
    """Quality after 1, 2, 4 ... closed-loop steps, and the gain over persistence and over the other run."""
    count = len(metrics["rollout_psnr"])
    kinds = {"psnr": ("PSNR, dB", ".2f"), "ssim": ("SSIM", ".3f"), "lpips": ("LPIPS", ".3f")}
    kinds = {kind: value for kind, value in kinds.items() if f"rollout_{kind}" in metrics}
    header, rows = ["steps ahead"], []
    for label, _ in kinds.values():
        header += [label, "95% interval"]
    gains = {"rollout_gain_95": "over persistence, dB", "against_gain_95": "over the other run, dB"}
    gains = {name: label for name, label in gains.items() if name in metrics}
    for step in shown_steps(count):
        row = [str(step)]
        for kind, (_, form) in kinds.items():
            name = f"rollout_{kind}"
            row += [f"{metrics[name][step - 1]:{form}}", between(metrics[f"{name}_95"][step - 1], form)]
        rows.append(row + [between(metrics[name][step - 1], "+.2f") for name in gains])
    return as_table([*header, *gains.values()], rows)


def rollout_curves(metrics: dict[str, Any]) -> Figure:
    kinds = [kind for kind in ("psnr", "ssim", "lpips") if f"rollout_{kind}" in metrics]
    figure, panels = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 3.2), squeeze=False)
    lines = (
        ("", "model", "-"),
        ("persistence_", "last frame repeated", "--"),
        ("mean_image_", "mean image of the training levels", (0, (1, 2))),
        ("against_", "the other run", ":"),
        ("tokenised_", "true tokens", "-."),
    )
    for axes, kind in zip(panels[0], kinds, strict=True):
        for source, label, style in lines:
            name = f"{source}rollout_{kind}"
            if name in metrics:
                curve(axes, metrics, name, label, style)
        axes.set(xlabel="steps ahead", ylabel={"psnr": "PSNR, dB"}.get(kind, kind.upper()))
    panels[0, 0].legend(frameon=False)
    figure.tight_layout()
    return figure


def curve(axes: Axes, metrics: dict[str, Any], name: str, label: str, style: Any = "-") -> None:
    """A metric against steps ahead, with its interval; undefined values (None) leave a gap."""
    values, intervals = np.array(metrics[name], float), np.array(metrics[f"{name}_95"], float)
    steps = np.arange(1, len(values) + 1)
    (line,) = axes.plot(steps, values, linestyle=style, label=label)
    axes.fill_between(steps, *intervals.T, alpha=0.2, color=line.get_color(), linewidth=0)


JUMP_NOTE = (
    "PSNR in dB. Each horizon is fed back alone, one pass of the model per jump, and measured at its own size, beside "
    "the last frame seen and the rollout frame by frame at the same frames. Upsampled and enlarged: at full size, from "
    "the small prediction with the upsampler and without."
)


def jump_table(found: dict[str, Any]) -> str:
    columns = {"psnr": "jumps", "persistence_psnr": "last frame seen", "rollout_psnr": "frame by frame"}
    columns |= {"full_size_psnr": "upsampled", "enlarged_psnr": "enlarged"}
    columns |= {"best_psnr": "best draw of each clip", "draws_psnr": "mean of the draws"}
    columns = {name: title for name, title in columns.items() if any(name in of for of in found.values())}
    header, rows = ["frames ahead", "jump"], []
    for title in columns.values():
        header += [title, "95% interval"]
    for label, of in found.items():
        for jump in (step - 1 for step in shown_steps(len(of["psnr"]))):
            row = [label, str(jump + 1)]
            for name in columns:
                both = (f"{of[name][jump]:.2f}", between(of[f"{name}_95"][jump], ".2f")) if name in of else ("", "")
                row += both
            rows.append(row)
    return as_table(header, rows)


GAIN_NOTE = (
    "PSNR of rollouts over that of the better of two pictures, at each step: the last frame seen, and the mean image "
    "of the training levels. Where the gain is not above 0, a rollout tells less than they do. Action ratio: mean "
    "squared error with other clips' actions over that with the true ones; near 1, the model ignores its actions."
)


def gain_curve(metrics: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(figsize=(6, 3.2))
    curve(axes, metrics, "gain", "gain")
    axes.axhline(0, color="#999", linewidth=1)
    axes.set(xlabel="steps ahead", ylabel="gain, dB")
    figure.tight_layout()
    return figure


def gain_sentence(metrics: dict[str, Any]) -> str:
    zero = metrics["gain_zero_step"]
    ends = "is positive at every step" if zero is None else f"is first at or below 0 at step {zero}"
    sentence = f"<p>The gain {ends}.</p>"
    if "rollout_action_ratio" not in metrics:
        return sentence
    columns = {f"step {i}": i - 1 for i in range(1, len(metrics["rollout_action_ratio"]) + 1)}
    found = [(name, *(metrics[f"rollout_action_ratio{end}"][i] for end in ("", "_95"))) for name, i in columns.items()]
    if "action_ratio" in metrics:
        ahead = metrics["action_ratio"]
        found = [(f"{k} ahead, open loop", ahead[k], metrics["action_ratio_95"][k]) for k in ahead] + found
    rows = [[name, number(ratio), bounds(interval)] for name, ratio, interval in found]
    return sentence + as_table(["frames", "action ratio", "95% interval"], rows)


def number(value: float | None, form: str = ".2f") -> str:
    return "undefined" if value is None else f"{value:{form}}"


def bounds(interval: list[float | None], form: str = ".2f") -> str:
    low, high = interval
    return "" if low is None or high is None else between([low, high], form)


POSITION_NOTE = (
    "Distance in pixels between where an object is and where it is read from the rolled-out frame, by a small network "
    "trained on true frames of the training levels; mean over visible objects. Baseline: every object stays where it "
    "was in the last frame seen. The reader's own error, on true held-out frames, is the least that can be told."
)


def position_curves(metrics: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(figsize=(6, 3.4))
    curve(axes, metrics, "position_error", "model")
    curve(axes, metrics, "position_error_copy", "last position seen", "--")
    if metrics["reader_error"] is not None:
        axes.axhline(metrics["reader_error"], color="#999", linestyle=":", label="reader, on true frames")
    axes.set(xlabel="steps ahead", ylabel="position error, pixels", ylim=(0, None))
    axes.legend(frameon=False)
    figure.tight_layout()
    return figure


def position_table(metrics: dict[str, Any]) -> str:
    by_object = metrics["position_error_by_object"]
    header = ["steps ahead", "position error, px", "95% interval", "last position seen", "95% interval"]
    rows = []
    for step in shown_steps(len(metrics["position_error"])):
        row = [str(step)]
        for name in ("position_error", "position_error_copy"):
            row += [number(metrics[name][step - 1]), bounds(metrics[f"{name}_95"][step - 1])]
        rows.append(row + [number(errors[step - 1]) for errors in by_object.values()])
    own = [number(error) for error in metrics["reader_error_by_object"].values()]
    rows.append(["reader, on true frames", number(metrics["reader_error"]), "", "", "", *own])
    seen = metrics["reader_seen_levels"]
    sentence = f"<p>The reader was trained on {seen:.0%} of the held-out levels.</p>" if seen else ""
    return as_table(header + [html.escape(name) for name in by_object], rows) + sentence


PROBE_NOTE = (
    "Ridge regression from the hidden state at frame n, fitted on training levels, measured on held-out ones. R2: "
    "share of the variance that it explains, 1 at best and 0 for the mean; error: mean absolute error of a coordinate."
)


def probe_table(found: dict[str, Any]) -> str:
    units = {"position": "px", "velocity": "px per frame"}
    rows = []
    for kind, leads in found.items():
        for lead, scores in leads.items():
            row = [f"{kind} at n + {lead}", number(scores["r2"], ".3f")]
            rows.append([*row, f"{number(scores['mae'], '.3f')} {units[kind]}"])
    return as_table(["read from the state at n", "R2", "error"], rows)


DRIFT_NOTE = (
    "Disagreement: distance between the far horizons' earlier predictions of a frame and the frame generated later, "
    "which needs no ground truth. Each point is one clip at one step; rank correlations, with 95% intervals over "
    "clips. AUROC: of two rollouts, one with an error above the median and one without, how often the "
    "former disagrees more; 0.5 is chance."
)


def drift_points(drift: np.ndarray, errors: np.ndarray) -> Figure:
    figure, axes = plt.subplots(figsize=(5.5, 3.6))
    steps = np.broadcast_to(np.arange(1, drift.shape[1] + 1), drift.shape)
    known = ~np.isnan(drift)
    points = axes.scatter(drift[known], errors[known], c=steps[known], s=8, linewidths=0)
    axes.set(xlabel="disagreement of the horizons", ylabel="true squared error", xscale="log", yscale="log")
    figure.colorbar(points, label="steps ahead")
    return figure


def drift_sentence(drift: dict[str, Any]) -> str:
    def shown(name: str) -> str:
        if drift[name] is None:
            return "undefined (the values are all equal)"
        return f"{drift[name]:.2f} ({between(drift[f'{name}_95'], '.2f')})"

    overall, within, rollouts, auroc = (shown(name) for name in ("overall", "within_step", "per_rollout", "auroc"))
    return (
        f"<p>Correlation with the true error: {overall}; among clips at the same step: {within}; among whole rollouts: "
        f"{rollouts}. AUROC for the rollouts with an error above the median: {auroc}.</p>"
    )
