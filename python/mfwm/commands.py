"""The commands of the command line and their options: mfwm collect | data | train ... | play | export | demo."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from .data.recording import Balls
from .demo import Demo
from .describe import Describe
from .play.command import Play
from .presets import PRESETS
from .training.latent_actions import LatentActionsTraining
from .training.tokenizer import TokenizerTraining
from .training.world_model import TrainingConfig

BALLS = Balls()


@dataclass
class Collect:
    """Record action-labelled video of a game into a Zarr replay buffer."""

    env: tyro.conf.Positional[str]
    """coinrun (or another procgen game), atari:<Game>, doom, doom:<scenario> or balls."""
    frames: int
    out: str
    """A directory, or a URL that fsspec supports."""
    seed: int = 0
    size: int = 64
    """Frames are size x size pixels."""
    frame_skip: int = 1
    """Each action is repeated for this many frames of the game, of which the last one is recorded."""
    field: bool = False
    """Crop to the playing field, in atari:Freeway, atari:Pong and atari:Breakout."""
    balls: Balls = BALLS
    overwrite: bool = False
    """Replace the replay buffer in `out` once the new one is complete."""

    def run(self) -> None:
        from .data.collect import collect

        # Options of balls are refused for other environments, but their defaults are not.
        balls = None if self.balls == BALLS else self.balls
        collect(
            self.env,
            self.frames,
            self.out,
            seed=self.seed,
            size=self.size,
            frame_skip=self.frame_skip,
            field=self.field,
            balls=balls,
            overwrite=self.overwrite,
        )


@dataclass
class Check:
    """Read a whole replay buffer and list every truncated or missing chunk, NaN action, length mismatch ..."""

    replay: tyro.conf.Positional[str]
    """A directory, or a URL that fsspec supports."""
    clip: int = TrainingConfig.clip
    """Frames in a training clip."""

    def run(self) -> None:
        from .data.check import check

        problems = check(self.replay, self.clip)
        for problem in problems:
            print(problem)
        invalid = sum(problem.invalid for problem in problems)
        print(f"{self.replay}: " + (f"invalid: {invalid} problem{'s' * (invalid > 1)}" if invalid else "ok"))
        raise SystemExit(1 if invalid else 0)


@dataclass
class Import:
    """Options that all imports have."""

    folder: tyro.conf.Positional[Path]
    out: str
    """A directory, or a URL that fsspec supports."""
    skip_damaged: bool = False
    """Leave out damaged episodes and count them, instead of refusing the whole import."""
    overwrite: bool = False
    """Replace the replay buffer in `out` once the new one is complete."""

    @property
    def options(self) -> dict[str, Any]:
        return {"skip_damaged": self.skip_damaged, "overwrite": self.overwrite}

    def finish(self, left_out: list[str]) -> None:
        for reason in left_out:
            print(f"left out: {reason}")
        print(f"{self.out}: {len(left_out)} damaged episodes left out")


@dataclass
class ImportVideos(Import):
    """Write a folder of MP4 files and its actions.csv as a replay buffer; mfwm.data.import_videos describes
    the table."""

    size: tuple[int, int] | None = None
    """Height and width to scale frames to; by default they keep their size."""

    def run(self) -> None:
        from .data.import_videos import import_videos

        self.finish(import_videos(self.folder, self.out, size=self.size, **self.options))


@dataclass
class ImportLeRobot(Import):
    """Write one camera of a LeRobot data set (format v2 or v3) and its actions as a replay buffer."""

    camera: str | None = None
    """Name of the camera's feature, if there are several cameras."""
    size: tuple[int, int] | None = None
    """Height and width to scale frames to; by default they keep their size."""

    def run(self) -> None:
        from .data.import_lerobot import import_lerobot

        self.finish(import_lerobot(self.folder, self.out, camera=self.camera, size=self.size, **self.options))


@dataclass
class ImportTokens(Import):
    """Write token memmaps, such as those of the 1X World Model Challenge, as a replay buffer of tokens."""

    ids: int = 1
    """2 splits each id of a vocabulary of 262,144 into two of 512."""

    def run(self) -> None:
        from .data.import_tokens import import_tokens

        self.finish(import_tokens(self.folder, self.out, ids=self.ids, **self.options))


@dataclass
class Data:
    """Check data sets, and import them from other layouts."""

    command: tyro.conf.OmitSubcommandPrefixes[
        Annotated[Check, tyro.conf.subcommand("check")]
        | Annotated[ImportVideos, tyro.conf.subcommand("import-videos")]
        | Annotated[ImportLeRobot, tyro.conf.subcommand("import-lerobot")]
        | Annotated[ImportTokens, tyro.conf.subcommand("import-tokens")]
    ]

    def run(self) -> None:
        self.command.run()


@dataclass
class Train:
    """Train a multi-frame world model, or resume the run in `out`. --preset NAME chooses the defaults."""

    out: Path
    config: Annotated[TrainingConfig, tyro.conf.arg(name="")]

    def run(self) -> None:
        from .data.replay import Replay
        from .training.world_model import for_replay, train

        train(for_replay(self.config, Replay(self.config.data)), self.out)


@dataclass
class TrainTokenizer:
    """Train a video tokenizer, or resume the run in `out`, and evaluate it on held-out levels."""

    out: Path
    config: Annotated[TokenizerTraining, tyro.conf.arg(name="")]

    def run(self) -> None:
        from .evaluation.tokenizer import evaluate_tokenizer
        from .training.tokenizer import for_pixels, train_tokenizer

        train_tokenizer(for_pixels(self.config), self.out)
        print(json.dumps(evaluate_tokenizer(self.out), indent=2))


@dataclass
class TrainLatentActions:
    """Train a model that infers actions from video, or resume the run in `out`, and evaluate it."""

    out: Path
    config: Annotated[LatentActionsTraining, tyro.conf.arg(name="")]

    def run(self) -> None:
        from .evaluation.latent_actions import evaluate_latent_actions
        from .training.latent_actions import train_latent_actions
        from .training.tokenizer import for_pixels

        train_latent_actions(for_pixels(self.config), self.out)
        print(json.dumps(evaluate_latent_actions(self.out), indent=2))


@dataclass
class Encode:
    """Write a replay buffer with a tokenizer's ids in place of frames, inferred codes in place of actions, or both."""

    data: tyro.conf.Positional[str]
    """A replay buffer of pixels: a directory, or a URL that fsspec knows."""
    out: str
    tokenizer: Path | None = None
    """A run of train-tokenizer."""
    low_tokenizers: tuple[Path, ...] = ()
    """Runs of train-tokenizer with a --factor each: their ids of smaller frames are targets of far horizons."""
    latent_actions: Path | None = None
    """A run of train-latent-actions."""
    overwrite: bool = False
    """Replace the replay buffer in `out` once the new one is complete."""

    def run(self) -> None:
        from .encode import encode

        encode(
            self.data,
            self.out,
            tokenizer=self.tokenizer,
            low_tokenizers=self.low_tokenizers,
            latent_actions=self.latent_actions,
            overwrite=self.overwrite,
        )


@dataclass
class Evaluate:
    """Evaluate a run on held-out levels; writes metrics.json, report.html and rollout.gif."""

    run_directory: tyro.conf.Positional[Path]
    data: str | None = None
    """Where the run's data set is, if it was moved."""
    pixels: str | None = None
    """For a run on tokens: where the frames are that they were encoded from, if they were moved."""
    tokenizer: Path | None = None
    """For a run on tokens: where the run of their tokenizer is, if it was moved."""
    against: Path | None = None
    """Another run on the same data, such as one that predicts only the next frame, to compare rollouts with."""
    lpips: Path | None = None
    """A file with the weights of LPIPS: torch.save(lpips.LPIPS(net="alex").state_dict(), FILE)."""
    reader: Path | None = None
    """A file for the reader of positions, shared by evaluations on one data set: read if it exists, else written."""
    jumps: bool = False
    """Also roll out in jumps along every horizon of offset 2 or more."""
    steps: int = 32
    """Steps of rollouts; fewer if most held-out episodes are shorter."""
    clips: int = 96
    samples: int = 10
    """Draws of each frame that a horizon with a latent predicts, and of each rollout in jumps."""
    temperature: float = 0.0
    """Of the tokens, or of a near distribution, that rollouts draw; 0: the most likely ones, the means."""
    seed: int = 0

    def run(self) -> None:
        from .evaluation.report import write_report
        from .evaluation.world_model import evaluate

        places: dict[str, Any] = {"data": self.data, "pixels": self.pixels, "tokenizer": self.tokenizer}
        options: dict[str, Any] = {"against": self.against, "lpips": self.lpips, "clips": self.clips, "seed": self.seed}
        options |= {"reader": self.reader, "jumps": self.jumps, "steps": self.steps, "samples": self.samples}
        options |= {"temperature": self.temperature}
        print(json.dumps(evaluate(self.run_directory, **places, **options), indent=2))
        print(f"report: {write_report(self.run_directory, **places)}")


@dataclass
class Study:
    """Run a study: the arms, worlds and seeds of a plan file, as cells side by side; resumes where it was."""

    plan: tyro.conf.Positional[Path]
    """A TOML file; mfwm.study.plan describes it."""
    out: Path
    workers: int = 1
    """Cells to run side by side, each with the threads that the plan says."""
    train_only: bool = False
    """Train the cells and leave their evaluation to a later call."""
    time: bool = False
    """Only measure how long a step of each arm takes, on a machine that does nothing else."""
    report: bool = False
    """Only write results and page from the cells that are done, also while the study runs."""
    merge: tuple[Path, ...] = ()
    """results.json files of the same plan from other machines: their cells are not run here, and are part of the
    results."""

    def run(self) -> None:
        from .study.runner import report, study, time_arms

        if self.time + self.report + self.train_only > 1:
            raise ValueError("only one of --train-only, --time and --report can be given")
        if self.report:
            print(f"study: {report(self.plan, self.out, self.merge)}")
        elif self.time:
            print(json.dumps(time_arms(self.plan, self.out), indent=2))
        else:
            study(self.plan, self.out, workers=self.workers, train_only=self.train_only, merge=self.merge)


@dataclass
class Export:
    """Write the weights of a run as one safetensors file; mfwm.export.load_exported reads it."""

    run_directory: tyro.conf.Positional[Path]
    out: Path

    def run(self) -> None:
        from .export import export

        export(self.run_directory, self.out)


def command_of(preset_name: str, arguments: list[str], description: str | None) -> Any:
    """The command that the arguments name, with its options; `description` is shown at the top of --help."""
    preset = Train(out=tyro.MISSING, config=replace(PRESETS[preset_name], data=tyro.MISSING))
    return tyro.cli(
        Annotated[Collect, tyro.conf.subcommand("collect")]
        | Annotated[Data, tyro.conf.subcommand("data")]
        | Annotated[Describe, tyro.conf.subcommand("describe")]
        | Annotated[Train, tyro.conf.subcommand("train", default=preset)]
        | Annotated[TrainTokenizer, tyro.conf.subcommand("train-tokenizer")]
        | Annotated[TrainLatentActions, tyro.conf.subcommand("train-latent-actions")]
        | Annotated[Encode, tyro.conf.subcommand("encode")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Study, tyro.conf.subcommand("study")]
        | Annotated[Play, tyro.conf.subcommand("play")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Demo, tyro.conf.subcommand("demo")],
        prog="mfwm",
        description=description,
        args=arguments,
    )
