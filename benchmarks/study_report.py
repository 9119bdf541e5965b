"""python -m benchmarks.study_report: write what the studies came to into docs/study.md and README.md.

Every figure is computed from benchmarks/results/study/NAME.json, the results file of benchmarks/study/NAME.toml, for
the core and for the study of sizes. The text between the markers of that name is replaced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mfwm.metrics.intervals import mean_of_defined
from mfwm.study.plan import Plan, read_plan
from mfwm.study.results import Results, load
from mfwm.study.statistics import Difference, difference, holm, seeds_needed

from .report import table

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {"steps": "steps", "flops": "FLOPs", "time": "time"}
# The worlds that all core arms are trained on, and those that differ in the distance of frames.
WORLDS, FRAME_RATES = ("balls", "noisy", "freeway"), ("balls", "skip2", "skip4")


class Study(ABC):
    """A plan and its results, and how its figures are printed."""

    def __init__(self, plan: Plan, results: Results) -> None:
        self.plan, self.results = plan, results

    @abstractmethod
    def answers(self) -> Iterator[tuple[str, str]]:
        """A verdict and its figures for each prediction, in their order."""

    def worlds(self, among: tuple[str, ...]) -> list[str]:
        return [world for world in among if world in self.results.worlds()]

    def next_frame(self, world: str, arm: str, column: str = "steps") -> np.ndarray:
        """[seeds]: PSNR of the next frame, given true frames."""
        cells = self.results.cells
        return np.array(
            [next(iter(cells[world, arm, s][column]["psnr"].values())) for s in self.results.seeds(world, arm)]
        )

    def next_frame_cost(self, world: str, arm: str, column: str = "steps") -> Difference | None:
        """The PSNR of the next frame of `arm` minus that of A0, paired by seed."""
        pair = {name: dict(zip(self.results.seeds(world, name), self.next_frame(world, name, column), strict=True))
                for name in (arm, "A0")}  # fmt: skip
        seeds = sorted(set(pair[arm]) & set(pair["A0"]))
        if not seeds:
            return None
        return difference(*(np.array([[pair[name][seed]] for seed in seeds]) for name in (arm, "A0")))

    def versus(self, arm: str, against: str, worlds: tuple[str, ...], column: str = "steps") -> dict[str, Difference]:
        """The difference in position error by world, where both arms have seeds in common."""
        found = {}
        for world in self.worlds(worlds):
            if {arm, against} <= set(self.results.arms(world)):
                of_world = self.results.difference(world, arm, against, column)
                if of_world is not None:
                    found[world] = of_world
        return found

    def price_table(self) -> str:
        """What every arm costs the next frame on every world that A0 was trained on."""
        worlds = [world for world in self.results.worlds() if "A0" in self.results.arms(world)]
        rows = []
        for arm, described in self.plan.arms.items():
            costs = [self.next_frame_cost(world, arm, "flops") for world in worlds]
            if arm != "A0" and any(costs):
                rows.append([f"{arm}: {described.title}", *map(price, costs)])
        return table(["arm", *worlds], rows)

    def arms_table(self, world: str) -> str:
        against, results = self.plan.endpoint.against, self.results
        found = {arm: d for arm in results.arms(world) if arm != against
                 for d in [results.difference(world, arm, against)] if d is not None}  # fmt: skip
        corrected = holm({arm: d.p for arm, d in found.items()})
        rows = []
        for arm in results.arms(world):
            clips = results.values(world, arm, "clips")
            errors = [
                f"{mean_of_defined(mean_of_defined(results.values(world, arm, 'clips', column))[None])[0]:.2f}"
                for column in COLUMNS
            ]
            lasting = [cell["gain_zero_step"] for cell in self.cells(world, arm)]
            lasts = [len(c["gain"]) if z is None else z - 1
                     for z, c in zip(lasting, self.cells(world, arm), strict=True)]  # fmt: skip
            rows.append(
                [
                    f"{arm}: {self.plan.arms[arm].title}",
                    str(len(clips)),
                    f"{self.next_frame(world, arm).mean():.2f}",
                    f"{np.mean(lasts):.1f}",
                    *errors,
                    shown(found[arm]) if arm in found else "",
                    f"{corrected[arm]:.4f}" if arm in found else "",
                ]
            )
        head = ["arm", "seeds", "next frame, dB", "gain lasts, steps"]
        head += [f"error at equal {name}, px" for name in COLUMNS.values()]
        return table([*head, f"minus {against} at equal steps", "p, Holm"], rows)

    def error_of_common(self, world: str, *arms: str) -> dict[str, float]:
        """The position error of each arm at equal steps, over the seeds that all of them have; empty without any."""
        seeds = self.results.seeds(world, *arms)
        return {
            arm: float(mean_of_defined(mean_of_defined(self.results.values(world, arm, "clips", seeds=seeds))[None])[0])
            for arm in arms
            if seeds
        }

    def cells(self, world: str, arm: str) -> list[dict]:
        return [self.results.cells[world, arm, seed]["steps"] for seed in self.results.seeds(world, arm)]

    def endpoint_table(self) -> str:
        arm, against = self.plan.endpoint.arm, self.plan.endpoint.against
        rows = []
        for world in self.results.worlds():
            for column, name in COLUMNS.items():
                found = self.versus(arm, against, (world,), column).get(world)
                if found is None:
                    continue
                seeds = self.results.seeds(world, arm, against)
                values = [self.results.values(world, name, "clips", column, seeds) for name in (arm, against)]
                of_seeds = mean_of_defined(values[0] - values[1])
                rival = float(mean_of_defined(values[1]).mean())
                needed = str(seeds_needed(of_seeds, 0.1 * rival)) if len(seeds) > 1 else ""
                rows.append([world, name, shown(found), f"{found.p:.4f}", str(found.seeds), needed])
        head = ["world", "equal", f"{arm} minus {against}, px", "p", "seeds", f"seeds that show a tenth of {against}"]
        return table(head, rows)

    def report(self) -> str:
        planned, done = len(self.plan.cells()), len(self.results.cells)
        seeds = {world: max(len(self.results.seeds(world, arm)) for arm in self.results.arms(world))
                 for world in self.results.worlds()}  # fmt: skip
        parts = [
            f"{done} of {planned} cells have been run, {self.plan.steps:,} steps each in the column of equal steps: "
            + ", ".join(
                f"{count} seeds on {world}" if count > 1 else f"1 seed on {world}" for world, count in seeds.items()
            )
            + ". An interval of one seed is over its clips alone, and says nothing about another seed. The columns of "
            "an arm are means over its own seeds; differences are paired, over the seeds that both arms have.",
            "The endpoint, in pixels of a rolled-out frame; less is better:",
            self.endpoint_table(),
            "The predictions:",
            table(
                [
                    "predicted",
                    "came true" if done == planned else "so far",
                    "position error at equal steps, px, where nothing else is named",
                ],
                [[text, *answer] for text, answer in zip(self.plan.predictions, self.answers(), strict=True)],
            ),
        ]
        parts += [
            "The price at the near end: the PSNR of the next frame, given true frames, minus that of A0 at equal "
            "FLOPs, in dB, paired by seed. An interval needs two seeds.",
            self.price_table(),
        ]
        for world in self.results.worlds():
            parts += [f"{self.plan.worlds[world].title}:", self.arms_table(world)]
        return "\n\n".join(parts)


class Core(Study):
    """Does it help?"""

    def answers(self) -> Iterator[tuple[str, str]]:
        found = self.versus("B3", "B2", WORLDS)
        yield verdict(found, not any(d.high < 0 for d in found.values())), differences("B3 minus B2", found)

        rivals = {rival: self.versus("B4", rival, WORLDS) for rival in ("B2", "B3", "A1")}
        wins = [d.high < 0 for of_rival in rivals.values() for d in of_rival.values()]
        figures = "; ".join(differences(f"B4 minus {rival}", found) for rival, found in rivals.items())
        yield verdict(wins, all(wins), in_part=any(wins)), figures

        found = self.versus("B4", "A1", FRAME_RATES)
        gains = [-d.mean for d in found.values()]
        answer = verdict(found, gains == sorted(gains, reverse=True))
        if found and gains[0] <= 0:
            answer = "cannot be asked: there is no gain to shrink"
        yield answer, differences("B4 minus A1", found)

        costs = {arm: self.next_frame_cost("balls", arm) for arm in ("B8e", "B4", "B8a")}
        known = {arm: cost for arm, cost in costs.items() if cost is not None}
        saved = [known[arm].low > -0.1 for arm in ("B4", "B8a") if arm in known]
        equal_costs = "B8e" in known and known["B8e"].high < 0
        figures = [f"{self.plan.arms[arm].title} {price(cost)}" for arm, cost in known.items()]
        yield (
            verdict(known, equal_costs and all(saved), in_part=equal_costs),
            f"next frame on balls, minus A0, dB: {', '.join(figures) or 'not run'}",
        )

        found = self.versus("B4", "A1", ("balls", "noisy"))
        both = found if len(found) == 2 else {}
        yield (
            verdict(both, bool(both) and found["noisy"].mean < min(0.0, found["balls"].mean)),
            differences("B4 minus A1", found),
        )

    def short(self) -> str:
        """What README.md says: the endpoint and the best arm of each world, over the seeds that all arms shown have."""
        arm, against = self.plan.endpoint.arm, self.plan.endpoint.against
        compared, rows = ("A0", against, arm), []
        for world in self.worlds(WORLDS):
            if not set(compared) <= set(self.results.arms(world)):
                continue
            seeds = self.results.seeds(world, *compared)
            complete = [arm for arm in self.results.arms(world) if set(seeds) <= set(self.results.seeds(world, arm))]
            errors = self.error_of_common(world, *complete)
            if errors:
                best = min(errors, key=lambda name: errors[name])
                shown_errors = [f"{errors[name]:.2f}" for name in compared]
                shown_best = f"{best}: {self.plan.arms[best].title}, {errors[best]:.2f}"
                rows.append([self.plan.worlds[world].title, *shown_errors, shown_best, str(len(seeds))])
        titles = [self.plan.arms[name].title for name in compared]
        return table(["position error after 9 to 32 steps, px", *titles, "best arm", "seeds"], rows)


class Sizes(Study):
    """How small may a far frame be?"""

    def answers(self) -> Iterator[tuple[str, str]]:
        found = self.versus("C1", "B4", ("freeway",))
        error = self.error_of_common("freeway", "C1", "B4")
        yield verdict(found, bool(error) and error["C1"] <= 0.5 * error["B4"]), self.figures(found, "C1", "B4", error)

        found = self.versus("C2", "C1", ("freeway",))
        error = self.error_of_common("freeway", "C2", "C1")
        yield verdict(found, any(d.low > 0 for d in found.values())), self.figures(found, "C2", "C1", error)

        found = self.versus("C3", "B3", ("freeway",))
        error = self.error_of_common("freeway", "C3", "B3", "A0")
        holds = bool(error) and error["A0"] - error["C3"] >= 0.5 * (error["A0"] - error["B3"]) > 0
        yield verdict(found, holds), self.figures(found, "C3", "B3", error)

        rivals = {arm: self.versus(arm, "A0", ("balls",), "flops") for arm in self.plan.arms if arm != "A0"}
        of_balls = {arm: found["balls"] for arm, found in rivals.items() if found}
        yield (
            verdict(of_balls, not any(d.high < 0 for d in of_balls.values())),
            "at equal FLOPs, balls: " + ", ".join(f"{arm} minus A0 {shown(d)}" for arm, d in of_balls.items()),
        )

    def figures(self, found: dict[str, Difference], arm: str, against: str, errors: dict[str, float]) -> str:
        means = ", ".join(f"{name} {error:.2f}" for name, error in errors.items())
        return differences(f"{arm} minus {against}", found) + (f"; means {means}" if means else "")


def shown(found: Difference) -> str:
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def price(cost: Difference | None) -> str:
    """A difference in PSNR of the next frame; of one seed there is one value, and no clips to draw an interval from."""
    return "" if cost is None else shown(cost) if cost.seeds > 1 else f"{cost.mean:+.2f}"


def differences(name: str, found: dict[str, Difference]) -> str:
    return f"{name}: " + (", ".join(f"{world} {shown(d)}" for world, d in found.items()) or "not run")


def verdict(figures: Collection[Any], holds: bool, *, in_part: bool = False) -> str:
    if not figures:
        return "not run"
    return "yes" if holds else "in part" if in_part else "no"


def replaced(text: str, name: str, content: str) -> str:
    """The text with `content` between the markers of that name."""
    begin, end = f"<!-- {name}: written by python -m benchmarks.study_report -->", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def read(name: str) -> tuple[Plan, Results]:
    """A committed plan and its results."""
    results = load(ROOT / "benchmarks" / "results" / "study" / f"{name}.json")
    return read_plan(ROOT / "benchmarks" / "study" / f"{name}.toml"), results


def written() -> dict[Path, str]:
    """The contents of the files that `main` writes."""
    core, sizes = Core(*read("core")), Sizes(*read("sizes"))
    page, readme = ROOT / "docs" / "study.md", ROOT / "README.md"
    return {
        page: replaced(replaced(page.read_text(), "study", core.report()), "sizes", sizes.report()),
        readme: replaced(readme.read_text(), "study", core.short()),
    }


def main() -> None:
    for path, text in written().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
