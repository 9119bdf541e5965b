"""index.html of a study: what was asked and predicted, tables and plots of what came out, pictures of rollouts."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..evaluation.report import STYLE, as_table, picture, plt
from ..metrics.intervals import mean_of_defined
from ..training.checkpoints import write_atomically
from .plan import BUDGETS, Plan
from .results import Results
from .statistics import Difference, holm, seeds_needed

TITLES = {"steps": "Equal steps", "flops": "Equal FLOPs", "time": "Equal time"}


def write_page(plan: Plan, results: Results, out: Path, rollouts: dict[str, str]) -> Path:
    """Write index.html beside results.json. rollouts: by world, an <img> of rollouts beside the truth."""
    sections = [("Written down before the first run", predictions(plan)), ("Endpoint", endpoint_table(plan, results))]
    for world in results.worlds():
        title = plan.worlds[world].title or world
        content = curves(plan, results, world)
        content += "".join(
            f"<h3>{TITLES[column]}</h3>{arms_table(plan, results, world, column)}" for column in results.columns()
        )
        sections.append((title, content + rollouts.get(world, "")))
    body = "".join(f"<h2>{html.escape(title)}</h2>{content}" for title, content in sections)
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(plan.title)}</title>"
        f"<style>{STYLE} table {{ font-size: .85rem }} h3 {{ font-size: 1rem }}</style>"
        f"<h1>{html.escape(plan.title)}</h1><p>{html.escape(summary(plan, results))}</p>{body}</html>"
    )
    path = out / "index.html"
    write_atomically(path, page.encode())
    return path


def summary(plan: Plan, results: Results) -> str:
    planned = len(plan.cells())
    return (
        f"{len(results.cells)} of {planned} cells: an arm on a world with a seed, trained for {plan.steps} steps and "
        f"evaluated on {plan.clips} held-out clips. Arms of one seed start from the same trunk and see the same clips. "
        f"Equal FLOPs and equal time: those of {plan.arms[plan.compute].title} at {plan.steps} steps."
    )


def predictions(plan: Plan) -> str:
    return "<ol>" + "".join(f"<li>{html.escape(text)}</li>" for text in plan.predictions) + "</ol>"


def endpoint_name(plan: Plan) -> str:
    first, last = plan.endpoint.steps
    names = {"position_error": "position error, px", "rollout_mse": "squared error", "gain": "gain, dB"}
    return f"{names[plan.endpoint.measure]}, steps {first} to {last}"


def endpoint_table(plan: Plan, results: Results) -> str:
    """The endpoint in every world and column, and how many seeds it would take to show a tenth of the rival's value."""
    arm, against = plan.endpoint.arm, plan.endpoint.against
    rows = []
    for world in results.worlds():
        for column in results.columns():
            found = results.difference(world, arm, against, column)
            if found is None:
                continue
            seeds = results.seeds(world, arm, against)
            pair = [results.values(world, name, "clips", column, seeds) for name in (arm, against)]
            of_seeds, rival = mean_of_defined(pair[0] - pair[1]), mean_of_all(pair[1])
            of_seeds = of_seeds[~np.isnan(of_seeds)]
            needed = "" if len(of_seeds) < 2 or not rival else str(seeds_needed(of_seeds, 0.1 * abs(rival)))
            means = [f"{mean_of_all(values):.3f}" for values in pair]
            tests = [shown(found), f"{found.p:.4f}", str(found.seeds), needed]
            rows.append([world, TITLES[column], *means, *tests])
    titles = [html.escape(plan.arms[name].title) for name in (arm, against)]
    header = ["world", "column", *titles, "difference, 95% interval", "p", "seeds", "seeds for a tenth"]
    return f"<p>{endpoint_name(plan)}.</p>" + as_table(header, rows)


def mean_of_all(values: np.ndarray) -> float:
    """The mean over seeds of the means over clips."""
    return float(mean_of_defined(mean_of_defined(values)[None])[0])


def shown(found: Difference) -> str:
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def arms_table(plan: Plan, results: Results, world: str, column: str) -> str:
    """Every arm of a world: means over its seeds, and its difference from the endpoint's rival, corrected by Holm."""
    against = plan.endpoint.against
    rivals = [arm for arm in results.arms(world) if arm != against]
    differences = {arm: results.difference(world, arm, against, column) for arm in rivals}
    corrected = holm({arm: found.p for arm, found in differences.items() if found is not None})
    rows = []
    for arm in results.arms(world):
        found = differences.get(arm)
        clips = results.values(world, arm, "clips", column)
        at = results.values(world, arm, "at", column)
        rows.append(
            [
                f"{html.escape(arm)}: {html.escape(plan.arms[arm].title)}",
                str(len(clips)),
                f"{at[0]:.0f}",
                mean_and_spread(next_frame(results, world, arm, column), ".2f"),
                mean_and_spread(zero_steps(results, world, arm, column), ".1f"),
                mean_and_spread(mean_of_defined(clips), ".3f"),
                "" if found is None else shown(found),
                "" if found is None else f"{corrected[arm]:.4f}",
            ]
        )
    header = ["arm", "seeds", "steps", "next frame, dB", "gain lasts, steps", endpoint_name(plan)]
    header += [f"minus {html.escape(against)}", "p, Holm"]
    return as_table(header, rows)


def next_frame(results: Results, world: str, arm: str, column: str) -> np.ndarray:
    """[seeds]: PSNR of the next frame, given true frames."""
    return np.array([next(iter(cell["psnr"].values())) for cell in of_seeds(results, world, arm, column)])


def zero_steps(results: Results, world: str, arm: str, column: str) -> np.ndarray:
    """[seeds]: for how many rollout steps the gain over copying and the mean image is above 0."""
    return np.array(
        [
            len(cell["gain"]) if cell["gain_zero_step"] is None else cell["gain_zero_step"] - 1
            for cell in of_seeds(results, world, arm, column)
        ]
    )


def of_seeds(results: Results, world: str, arm: str, column: str) -> Iterable[dict]:
    return [results.cells[world, arm, seed][column] for seed in results.seeds(world, arm)]


def mean_and_spread(values: np.ndarray, form: str) -> str:
    """The mean over seeds, and their standard deviation."""
    if len(values) < 2:
        return f"{values.mean():{form}}"
    return f"{values.mean():{form}} &plusmn; {values.std(ddof=1):{form}}"


def curves(plan: Plan, results: Results, world: str, column: str = BUDGETS[0]) -> str:
    """Gain and position error against rollout steps: a line for each arm, its band a standard error over seeds."""
    names = {"gain": "gain over copying and the mean image, dB", "position_error": "position error, px"}
    figure, panels = plt.subplots(1, len(names), figsize=(11, 4))
    for axes, (name, label) in zip(panels, names.items(), strict=True):
        for arm in results.arms(world):
            if any(name not in cell for cell in of_seeds(results, world, arm, column)):
                continue
            values = results.values(world, arm, name, column)
            steps, mean = np.arange(1, values.shape[1] + 1), values.mean(0)
            (line,) = axes.plot(steps, mean, label=f"{arm}: {plan.arms[arm].title}")
            if len(values) > 1:
                error = values.std(0, ddof=1) / np.sqrt(len(values))
                axes.fill_between(steps, mean - error, mean + error, alpha=0.15, color=line.get_color(), linewidth=0)
        axes.set(xlabel="rollout step", ylabel=label)
    panels[0].axhline(0, color="#888", linewidth=0.8)
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return picture(figure)
