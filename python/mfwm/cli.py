"""The command line: mfwm collect | train | evaluate | demo."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from .presets import DEMO, PRESETS
from .training import TrainingConfig


@dataclass
class Collect:
    """Write real action-labelled video of a game into a Zarr replay buffer."""

    env: tyro.conf.Positional[str]
    """coinrun (or another procgen game), atari:<Game>, doom or doom:<scenario>."""
    frames: int
    out: Path
    seed: int = 0
    size: int = 64
    """Frames are size x size pixels."""
    overwrite: bool = False
    """Delete the replay buffer that stands in `out`."""

    def run(self) -> None:
        from .collect import collect

        collect(self.env, self.frames, self.out, seed=self.seed, size=self.size, overwrite=self.overwrite)


@dataclass
class Train:
    """Train a multi-frame world model; goes on where a run in `out` stopped. --preset NAME chooses the defaults."""

    out: Path
    config: Annotated[TrainingConfig, tyro.conf.arg(name="")]

    def run(self) -> None:
        from .data import Replay
        from .training import train

        train(for_replay(self.config, Replay(self.config.data)), self.out)


@dataclass
class Evaluate:
    """Measure a run on held-out levels; writes metrics.json, report.html and rollout.gif."""

    run_directory: tyro.conf.Positional[Path]
    clips: int = 96
    seed: int = 0

    def run(self) -> None:
        from .evaluation import evaluate
        from .report import write_report

        print(json.dumps(evaluate(self.run_directory, clips=self.clips, seed=self.seed), indent=2))
        print(f"report: {write_report(self.run_directory)}")


@dataclass
class Demo:
    """From nothing to a report: collect real game frames, train, evaluate. Goes on where it stopped."""

    out: Path = Path("runs/demo")
    data: Path = Path("data/demo")
    frames: int = 24_000
    steps: int = DEMO.steps

    def run(self) -> None:
        from .collect import collect, default_environment
        from .data import Replay
        from .evaluation import evaluate
        from .report import write_report
        from .training import train

        if not (self.data / "complete").exists():
            collect(default_environment(), self.frames, self.data, overwrite=self.data.exists())
            (self.data / "complete").touch()
        train(for_replay(replace(DEMO, data=str(self.data), steps=self.steps), Replay(self.data)), self.out)
        metrics = evaluate(self.out)
        for k in metrics["psnr"]:
            print(f"n + {k}: {metrics['psnr'][k]:.2f} dB, persistence {metrics['persistence_psnr'][k]:.2f} dB")
        if "delta_psnr" in metrics:
            print(f"true minus shuffled actions: {metrics['delta_psnr']:+.2f} dB")
        print(f"report: {write_report(self.out)}")


def for_replay(config: TrainingConfig, replay: object) -> TrainingConfig:
    """The config with the frame size and actions of the data."""
    from .data import Replay

    assert isinstance(replay, Replay)
    model = replace(
        config.model,
        frame=(3, replay.height, replay.width),
        actions=replay.actions or 0,
        action_size=0 if replay.actions else replay.action.shape[1],
    )
    return replace(config, model=model)


def main() -> None:
    # The preset comes first: it decides the defaults of all the other flags.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=list(PRESETS), default="plain")
    chosen, rest = first.parse_known_args()
    preset = Train(out=tyro.MISSING, config=replace(PRESETS[chosen.preset], data=tyro.MISSING))
    command = tyro.cli(
        Annotated[Collect, tyro.conf.subcommand("collect")]
        | Annotated[Train, tyro.conf.subcommand("train", default=preset)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Demo, tyro.conf.subcommand("demo")],
        prog="mfwm",
        description=__doc__,
        args=rest,
    )
    command.run()


if __name__ == "__main__":
    main()
