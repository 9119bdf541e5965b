"""Trainer: runs of a module that maps clips to a loss, in a directory of their own.

A run directory holds config.json, log.jsonl and checkpoints/. Killed or not, a run resumes where it was: the clips and
the random numbers of a step depend on (seed, step, process) alone, so the step is the position in both, and a resumed
run equals an uninterrupted one.

    with Trainer(config, out) as trainer:
        trainer.fit(objective, trainer.sampler())
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mfwm_kernels import arguments as check
from mfwm_kernels.dtypes import product_dtype

from ..data.place import location, overlap
from ..data.replay import ClipSampler, Replay, split_levels
from ..progress import Progress
from .checkpoints import Checkpoints, barrier
from .data_identity import digest, resolved
from .optimisation import MovingAverage, learning_rate, parameter_groups
from .parallel import distribute, gradients_shared, mean_over_processes, processes, sum_over_processes, whole
from .run_config import check_place, described, settle
from .run_lock import locked
from .run_log import Log, TensorBoard, Viewer, WeightsAndBiases


@dataclass(frozen=True)
class TrainerConfig:
    """How a module is trained; a subclass adds the module's own config.

    Args:
        data: a replay buffer that `mfwm collect` wrote. A run knows it by its content: it may be moved.
        steps: optimiser steps.
        batch: clips in a step, over all processes.
        accumulate: parts that a process takes its clips in, one after another, for one step.
        clip: frames in a clip; those past the model's context are targets only, so that the last positions have theirs.
        lr: peak learning rate of AdamW, after `warmup` steps.
        schedule: "cosine" from there to a tenth, or "wsd": the peak until the last `decay` of the steps, then a line.
        decay: the share of the steps in which "wsd" falls.
        weight_decay: of matrices; vectors and embeddings have none.
        clip_norm: the largest gradient norm that is not scaled down.
        ema: decay of a moving average of the weights, which evaluation then uses; 0 keeps none.
        dtype: of autocast, "bfloat16" or "float32"; "auto" is bfloat16 except on a CPU that does not multiply it in
            hardware, where it would be tens of times slower than float32.
        compile: torch.compile the module.
        deterministic: only algorithms whose results are the same in every run, and an error where there is none.
        seed: of weights, batches and random numbers.
        held_out: the share of levels kept for validation, never trained on.
        workers: threads that read clips ahead.
        checkpoint_every: steps between checkpoints; one is also written at the end.
        keep: the number of checkpoints that stay, the newest.
        parallel: "ddp" or "fsdp" in the processes that torchrun starts.
        look_every: steps between looks at a few held-out clips, whose figures and pictures join the log; 0 for none.
        tensorboard: write event files for TensorBoard into the run.
        wandb: log to Weights & Biases.
    """

    data: str
    steps: int = 600
    batch: int = 8
    accumulate: int = 1
    clip: int = 24
    lr: float = 1e-3
    warmup: int = 50
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay: float = 0.2
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = 0.0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    compile: bool = False
    deterministic: bool = False
    seed: int = 0
    held_out: float = 0.1
    workers: int = 1
    checkpoint_every: int = 100
    keep: int = 2
    parallel: Literal["none", "ddp", "fsdp"] = "none"
    look_every: int = 100
    tensorboard: bool = True
    wandb: bool = False

    def __post_init__(self) -> None:
        choices = {
            "dtype": ("auto", "bfloat16", "float32"),
            "schedule": ("cosine", "wsd"),
            "parallel": ("none", "ddp", "fsdp"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("steps", "batch", "accumulate", "clip", "workers", "checkpoint_every", "keep"):
            check.integer(name, getattr(self, name), least=1)
        for name in ("warmup", "seed", "look_every"):
            check.integer(name, getattr(self, name), least=0)
        for name in ("lr", "clip_norm"):
            if check.number(name, getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        check.number("weight_decay", self.weight_decay, least=0)
        for name in ("held_out", "ema", "decay"):
            check.number(name, getattr(self, name))
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {self.decay}")

    @property
    def frames_per_step(self) -> int:
        """Frames that a step trains on."""
        return self.batch * self.clip

    def learning_rate(self, step: int) -> float:
        return learning_rate(
            step, peak=self.lr, warmup=self.warmup, steps=self.steps, schedule=self.schedule, decay=self.decay
        )


class Objective(nn.Module):
    """What a Trainer trains: a module that maps clips to a loss.

    forward(clips, shares) gives the scalar to minimise and, by name, detached figures for the log. `clips` is a dict of
    tensors [B, ...], the rows of one process, or some of them.

    A loss may be a sum of means over different counts, such as a horizon's over the positions that have a target. A
    step's clips come in parts (of a process, of accumulation) whose gradients are averaged; so that they make the
    gradient of means over all clips, a module with such a loss says by `counts` how many elements of each mean a part
    holds. It is then given `shares`, of the same shape: parts * the part's counts / those of all parts. Each mean, and
    its figure, is to be multiplied by its share. With one part, and where `counts` is None, shares is None.

    names: of the entries of figures that are lists.
    """

    names: Sequence[str] = ()

    def drawn(self, clips: dict[str, Tensor]) -> dict[str, Tensor]:
        """What else a step draws at random, [B, ...] each, for a process's clips before they are cut into parts.

        `counts` and forward find it in their clips.
        """
        return {}

    def counts(self, clips: dict[str, Tensor]) -> Tensor | None:
        return None

    def look(self, clips: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Figures of held-out clips for the log, and pictures [3, height, width] in 0..1, by name."""
        return {}, {}


class Sampler(Protocol):
    """Where clips come from: this process's rows of the batches of steps first_step <= step < last_step, in order."""

    def batches(self, first_step: int, last_step: int, workers: int = 1) -> Iterator[dict[str, Tensor]]: ...


class Trainer:
    """A run in the directory `out`, in this process or in those that torchrun started, as its `config` says.

    To be entered as a context. ValueError where `out` holds a run with another config or data set, BlockingIOError
    where another process trains in it.

    config.data names a replay buffer; with a sampler of one's own, it may be a name that is none.
    """

    def __init__(self, config: TrainerConfig, out: Path, *, progress: bool = True) -> None:
        place = location(config.data)
        self.replay: Replay | None = None
        if isinstance(place, str) or (config.data and place.exists()):
            if overlap(config.data, out):
                raise ValueError(
                    f"out must be another place than data, which a run is not written into; got {out} and {config.data}"
                )
            self.replay = Replay(config.data)
            config = replace(config, data=resolved(config.data))
        self.config, self.out, self.progress = config, Path(out), progress
        self._stack = ExitStack()

    def __enter__(self) -> Trainer:
        config = self.config
        with self._stack:
            self.rank, self.processes, self.device = self._stack.enter_context(processes(config.parallel))
            # Parts of a batch whose gradients are averaged.
            self.parts = self.processes * config.accumulate
            if config.batch % self.parts:
                raise ValueError(
                    f"batch must be a multiple of processes * accumulate = {self.processes} * {config.accumulate}, "
                    f"got {config.batch}"
                )
            self.dtype = autocast_dtype(config.dtype, self.device)
            if self.rank == 0:
                check_place(config, self.out)
                self.out.mkdir(parents=True, exist_ok=True)
                self._stack.enter_context(locked(self.out))
                known = None if self.replay is None else digest(self.replay)
                settle(config, self.out, known, begun=self._begun())
                if self.progress:
                    print(described(config))
                    print(f"on {self.device}, {self.processes} processes, autocast to {self.dtype}")
            barrier()
            if config.deterministic:
                self._stack.enter_context(deterministic_algorithms())
            torch.manual_seed(config.seed)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _begun(self) -> bool:
        """Whether the run has anything that another config would be mixed with."""
        log = self.out / "log.jsonl"
        return Checkpoints(self.out / "checkpoints").latest() is not None or (log.exists() and log.stat().st_size > 0)

    def _data(self) -> Replay:
        if self.replay is None:
            self.replay = Replay(self.config.data)
        return self.replay

    def sampler(self) -> ClipSampler:
        """This process's clips of the levels to train on."""
        config, replay = self.config, self._data()
        training, _ = split_levels(replay, config.held_out, seed=config.seed)
        part = (self.rank, self.processes)
        return ClipSampler(replay, config.clip, config.batch, seed=config.seed, episodes=training, part=part)

    def held_out_clips(self, count: int = 4) -> dict[str, Tensor]:
        """Some clips of the levels that are not trained on, the same ones in every process."""
        replay = self._data()
        _, held_out = split_levels(replay, self.config.held_out, seed=self.config.seed)
        clips = ClipSampler(replay, self.config.clip, count, seed=self.config.seed, episodes=held_out).batch(0)
        return {name: value.to(self.device) for name, value in clips.items()}

    def fit(
        self,
        objective: Objective,
        sampler: Sampler,
        *,
        shown: dict[str, Tensor] | None = None,
        stop_after: int | None = None,
    ) -> None:
        """Train, from the newest checkpoint on where there is one.

        SIGTERM and SIGINT (Ctrl-C) save a checkpoint after the step in progress, and SystemExit follows. A second
        Ctrl-C ends a run of one process at once.

        shown: held-out clips to look at, on the trainer's device.
        stop_after: leave off after this step, as a killed run would with its checkpoint just written.
        """
        config = self.config
        if stop_after is not None:
            check.integer("stop_after", stop_after, least=1)
        objective.to(self.device).train()
        if config.compile:
            objective.compile()
        run = Run(self, objective)
        checkpoints = Checkpoints(self.out / "checkpoints", config.keep)
        first = run.resume(checkpoints)
        last = config.steps if stop_after is None else min(config.steps, stop_after)
        checkpoints.check_room(first, last)
        with ExitStack() as stack:
            bar = stack.enter_context(
                Progress("train", config.steps, "step", done=first, shown=self.progress and self.rank == 0)
            )
            log = None
            if self.rank == 0:
                viewers = self._viewers(first)
                log = stack.enter_context(closing(Log(self.out / "log.jsonl", first, viewers, objective.names)))
            signals = stack.enter_context(signals_noticed(alone=self.processes == 1))
            batches: Any = sampler.batches(first, last, config.workers)
            stack.callback(batches.close)
            began = time.perf_counter()
            for step in range(first, last):
                asked = time.perf_counter()
                clips = next(batches)
                waited = time.perf_counter() - asked
                row, stop = run.step(step, clips, bool(signals))
                # From the end of one step to the end of the next, so that waiting for data counts.
                seconds, began = time.perf_counter() - began, time.perf_counter()
                row |= {
                    "frames_per_second": config.frames_per_step / seconds,
                    "seconds": seconds,
                    "data_wait": waited / seconds,
                }
                pictures: dict[str, Tensor] = {}
                if shown is not None and config.look_every and (step + 1) % config.look_every == 0:
                    row["held_out"], pictures = run.look(shown)
                if log is not None:
                    log.write(row, pictures)
                bar.update(loss=f"{row['loss']:.4f}", frames_s=f"{row['frames_per_second']:.0f}")
                if (step + 1) % config.checkpoint_every == 0 or step + 1 == last or stop:
                    checkpoints.save(run.state(step + 1), step + 1)
                if stop:
                    bar.say(
                        f"stopped at step {step + 1} of {config.steps}, which is saved in {self.out}: "
                        "run the same command again to resume"
                    )
                    raise SystemExit(128 + (signals[0] if signals else signal.SIGTERM))
            if signals:
                raise SystemExit(128 + signals[0])  # It came while the last checkpoint was saved.

    def _viewers(self, first: int) -> list[Viewer]:
        viewers: list[Viewer] = []
        if self.config.tensorboard:
            viewers.append(TensorBoard(self.out / "tensorboard", first))
        if self.config.wandb:
            viewers.append(WeightsAndBiases(self.out, dataclasses.asdict(self.config)))
        return viewers


def train_on_replay(
    make: Callable[[], Objective], config: TrainerConfig, out: Path, progress: bool, stop_after: int | None
) -> Any:
    """Train the objective that `make` makes, on config.data, with looks at held-out clips; returns it."""
    with Trainer(config, out, progress=progress) as trainer:
        objective = make()
        shown = trainer.held_out_clips() if config.look_every else None
        trainer.fit(objective, trainer.sampler(), shown=shown, stop_after=stop_after)
    return objective


def load_weights(objective: Objective, run: Path, *, averaged: bool) -> int:
    """Fill the weights of `objective` from a run's newest checkpoint; returns the step of that."""
    checkpoints = Checkpoints(Path(run) / "checkpoints")
    state = {"model": objective.state_dict()}
    if averaged:
        # The parameters; what else a module keeps has no average.
        state["average"] = {name: p.detach().clone() for name, p in objective.named_parameters()}
    while True:
        step = checkpoints.latest()
        if step is None:
            raise FileNotFoundError(f"{run} holds no checkpoint: train first")
        try:
            checkpoints.load(state, step)
            break
        except ValueError:
            # A run that trains at the same time may have dropped it for newer ones.
            if step in checkpoints.steps():
                raise
    if averaged:
        objective.load_state_dict(state["average"], strict=False)
    return step


class Run:
    """The state of a run in one process, and its step."""

    def __init__(self, trainer: Trainer, objective: Objective) -> None:
        self.trainer, self.config, self.objective = trainer, trainer.config, objective
        # The module to call; the objective holds the weights, or this process's shards of them.
        self.module = distribute(objective, self.config.parallel)
        self.optimiser = torch.optim.AdamW(
            parameter_groups(objective, self.config.weight_decay), lr=self.config.lr, betas=(0.9, 0.95), fused=True
        )
        self.average = MovingAverage(objective, self.config.ema) if self.config.ema else None

    def step(self, step: int, clips: dict[str, Tensor], terminated: bool) -> tuple[dict[str, Any], bool]:
        """One optimiser step. Returns its row of the log, and whether any process was told to stop."""
        config, device = self.config, self.trainer.device
        torch.manual_seed(seed_of(config.seed, step, self.trainer.rank))
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate(step)
        self.optimiser.zero_grad(set_to_none=True)
        clips = {**clips, **self.objective.drawn(clips)}
        columns = {name: value.chunk(config.accumulate) for name, value in clips.items()}
        parts = [{name: column[i] for name, column in columns.items()} for i in range(config.accumulate)]
        totals: list[Tensor] = []
        named: list[dict[str, Tensor]] = []
        for i, (part, shares) in enumerate(zip(parts, self._shares(parts), strict=True), start=1):
            part = {name: value.to(device, non_blocking=True) for name, value in part.items()}
            with gradients_shared(self.module, i == len(parts)):
                with self._autocast():
                    total, figures = self.module(part, shares)
                (total / len(parts) if len(parts) > 1 else total).backward()
            totals.append(total.detach())
            named.append(figures)
        norm = whole(nn.utils.clip_grad_norm_(self.objective.parameters(), config.clip_norm))

        shapes = {name: value.shape for name, value in named[0].items()}
        rows = [
            torch.cat([total.view(1), *(figures[name].flatten() for name in shapes)])
            for total, figures in zip(totals, named, strict=True)
        ]
        told = torch.full((1,), float(terminated), device=device)
        loss, *values, told_share = mean_over_processes(torch.cat([torch.stack(rows).mean(0), told])).tolist()
        row: dict[str, Any] = {"step": step, "loss": loss}
        for name, shape in shapes.items():
            row[name] = torch.tensor(values[: shape.numel()], dtype=torch.float64).view(shape).tolist()
            del values[: shape.numel()]
        row |= {"gradient_norm": norm.item(), "lr": config.learning_rate(step)}
        if not np.isfinite(row["gradient_norm"]):
            raise FloatingPointError(f"step {step}: the gradient norm is {row['gradient_norm']}; {row}")
        self.optimiser.step()
        if self.average is not None:
            self.average.update()
        return row, told_share > 0

    def look(self, clips: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        self.objective.eval()
        with self._autocast():
            seen = self.objective.look(clips)
        self.objective.train()
        return seen

    def _autocast(self) -> torch.autocast:
        dtype = self.trainer.dtype
        return torch.autocast(self.trainer.device.type, dtype, enabled=dtype != torch.float32)

    def _shares(self, parts: list[dict[str, Tensor]]) -> list[Tensor | None]:
        """The shares of each part in the means over all of them, in all processes."""
        if self.trainer.parts == 1 or self.objective.counts(parts[0]) is None:
            return [None] * len(parts)
        counts: list[Any] = [self.objective.counts(part) for part in parts]
        stacked = torch.stack(counts).to(self.trainer.device, torch.float64)
        everywhere = sum_over_processes(stacked.sum(0))
        return list((self.trainer.parts * stacked / everywhere.clamp_min(1)).float())

    def state(self, step: int) -> dict[str, Any]:
        """All that the steps after `step` depend on."""
        weights, moments = get_state_dict(self.objective, self.optimiser)
        state = {"model": weights, "optimiser": moments, "step": torch.tensor(step)}
        if self.average is not None:
            state["average"] = self.average.averages
        return state

    def resume(self, checkpoints: Checkpoints) -> int:
        """Load the newest checkpoint and return the step to go on from; 0 where there is none."""
        latest = checkpoints.latest()
        if latest is None:
            return 0
        state = self.state(0)
        checkpoints.load(state, latest)
        set_state_dict(
            self.objective, self.optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"]
        )
        return int(state["step"])


def seed_of(*numbers: int) -> int:
    """A seed that follows from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def autocast_dtype(name: str, device: torch.device) -> torch.dtype:
    """What a `dtype` of the config means on this device."""
    if name == "auto":
        return product_dtype(torch.bfloat16) if device.type == "cpu" else torch.bfloat16
    return torch.float32 if name == "float32" else torch.bfloat16


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """torch's deterministic mode, left as it was afterwards."""
    # cuBLAS needs a fixed workspace for it, which it reads when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def signals_noticed(*, alone: bool) -> Iterator[list[signal.Signals]]:
    """A list of the SIGTERM and SIGINT that came. Only the main thread may handle signals: others leave them alone.

    alone: a second SIGINT raises KeyboardInterrupt at once. torchrun passes on to its processes the Ctrl-C that they
    have had from the terminal already, so several processes wait for their checkpoint.
    """
    noticed: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield noticed
        return

    def notice(number: int, frame: object) -> None:
        noticed.append(signal.Signals(number))
        if number == signal.SIGINT and alone:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, notice) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noticed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
