"""Trainer: trains a module that maps clips to a loss, in a run directory.

A run directory holds config.json, log.jsonl and checkpoints/. A run can be resumed however it ended, even if killed:
the clips and random numbers of a step depend only on (seed, step, process), so the step is the position in both, and a
resumed run equals an uninterrupted one.

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
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mfwm_kernels import arguments as check
from mfwm_kernels import multiplies_bf16

from ..checks import check_choices
from ..data.place import location, overlap
from ..data.replay import ClipSampler, Replay, split_levels
from ..progress import Progress
from .checkpoints import Checkpoints, barrier
from .data_identity import digest, resolved
from .optimisation import MovingAverage, learning_rate, parameter_groups
from .parallel import distribute, gathered, gradient_sync, mean_over_processes, processes, sum_over_processes
from .run_config import as_lines, check_out, read, write_or_compare
from .run_lock import locked
from .run_log import Log, TensorBoard, Viewer, WeightsAndBiases


@dataclass(frozen=True)
class TrainerConfig:
    """How a module is trained; a subclass adds the module's own config.

    Args:
        data: a replay buffer, such as `mfwm collect` writes. A run recognises it by content, so it may be moved.
        steps: optimiser steps.
        batch: clips per step, over all processes.
        accumulate: number of parts into which a process splits its clips of a step, run one after another.
        clip: frames per clip; those past the model's context are targets only, so that the last positions have targets.
        lr: peak learning rate of AdamW.
        warmup: steps in which the learning rate rises to its peak.
        schedule: after the warm-up, "cosine" falls to a tenth of the peak; "wsd" stays at the peak and falls linearly
            to a tenth over the last `decay` of the steps; "constant" stays at the peak, for use with `ema`.
        decay: share of the steps in which "wsd" falls.
        weight_decay: of matrices; vectors and embeddings have none.
        clip_norm: larger gradient norms are scaled down to this one.
        ema: decay of a moving average of the weights, which evaluation then uses; 0: no average.
        dtype: of autocast, "bfloat16" or "float32"; "auto" is bfloat16, except on a CPU that does not multiply it in
            hardware, where it would be tens of times slower than float32.
        compile: torch.compile the module.
        deterministic: use only algorithms with the same results in every run; an operation that has none is an error.
        seed: of weights, batches and random numbers.
        held_out: share of levels kept for validation and never trained on.
        workers: number of threads that read clips ahead.
        checkpoint_every: steps between checkpoints; one is also written at the end.
        keep: number of checkpoints to keep, the newest ones.
        parallel: "ddp" or "fsdp" in the processes that torchrun starts.
        look_every: steps between validations on a few held-out clips, which are logged with pictures; 0 for none.
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
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
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
        check_choices(self)
        for name in ("steps", "batch", "accumulate", "clip", "workers", "checkpoint_every", "keep"):
            check.integer(name, getattr(self, name), least=1)
        for name in ("warmup", "seed", "look_every"):
            check.integer(name, getattr(self, name), least=0)
        for name in ("lr", "clip_norm"):
            check.number(name, getattr(self, name), above=0)
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
        """Number of frames that a step trains on."""
        return self.batch * self.clip

    def learning_rate(self, step: int) -> float:
        return learning_rate(
            step, peak=self.lr, warmup=self.warmup, steps=self.steps, schedule=self.schedule, decay=self.decay
        )


class Objective(nn.Module):
    """What a Trainer trains: a module that maps clips to a loss.

    forward(clips, shares) returns the scalar to minimise and detached figures for the log, by name. `clips` is a dict
    of tensors [B, ...]: the clips of one process, or some of them.

    A step's clips are split into parts (over processes and accumulation) whose gradients are averaged. Where the loss
    is a sum of means over different counts, such as a horizon's mean over the positions that have a target, that
    average is not the gradient of the means over all clips. A module with such a loss returns from `counts` how many
    elements of each mean a part holds, and gets `shares` of the same shape: parts * the part's counts / the counts of
    all parts. It must multiply each mean, and its figure, by its share. With one part, or if `counts` returns None,
    shares is None.

    names: names for the entries of figures that are lists.
    """

    names: Sequence[str] = ()

    def begin_step(self, step: int) -> None:
        """Called before the loss of each step, in every process."""

    def random_inputs(self, clips: dict[str, Tensor]) -> dict[str, Tensor]:
        """Random tensors [B, ...] that a step needs, sampled once, before its clips are split into parts.

        `counts` and forward get them with their clips.
        """
        return {}

    def counts(self, clips: dict[str, Tensor]) -> Tensor | None:
        return None

    def validate(self, clips: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Figures of held-out clips for the log, and pictures [3, height, width] in 0..1, both by name."""
        return {}, {}


Config = TypeVar("Config", bound=TrainerConfig)
TrainedObjective = TypeVar("TrainedObjective", bound=Objective)


class Sampler(Protocol):
    """Source of clips: this process's part of the batches of steps first_step <= step < last_step, in order."""

    def batches(self, first_step: int, last_step: int, workers: int = 1) -> Iterator[dict[str, Tensor]]: ...


class Trainer:
    """A run in the directory `out`, in this process or, as config.parallel says, in those that torchrun started.

    Use it in a `with` statement. ValueError if `out` holds a run with another config or data set, BlockingIOError if
    another process trains in it.

    config.data names a replay buffer. With your own sampler, it may be any other name.
    """

    def __init__(self, config: TrainerConfig, out: Path, *, progress: bool = True) -> None:
        place = location(config.data)
        self.replay: Replay | None = None
        if isinstance(place, str) or (config.data and place.exists()):
            if overlap(config.data, out):
                raise ValueError(
                    f"out must be another place than data, since a run is not written into a data set; got {out} "
                    f"and {config.data}"
                )
            self.replay = Replay(config.data)
            config = replace(config, data=resolved(config.data))
        self.config, self.out, self.progress = config, Path(out), progress
        self._stack = ExitStack()

    def __enter__(self) -> Trainer:
        config = self.config
        with self._stack:
            self.rank, self.processes, self.device = self._stack.enter_context(processes(config.parallel))
            # Number of parts of a batch, whose gradients are averaged.
            self.parts = self.processes * config.accumulate
            if config.batch % self.parts:
                raise ValueError(
                    f"batch must be a multiple of processes * accumulate = {self.processes} * {config.accumulate}, "
                    f"got {config.batch}"
                )
            self.dtype = autocast_dtype(config.dtype, self.device)
            if self.rank == 0:
                check_out(config, self.out)
                self.out.mkdir(parents=True, exist_ok=True)
                self._stack.enter_context(locked(self.out))
                data_digest = None if self.replay is None else digest(self.replay)
                write_or_compare(config, self.out, data_digest, begun=self._begun())
                if self.progress:
                    print(as_lines(config))
                    count = "1 process" if self.processes == 1 else f"{self.processes} processes"
                    print(f"training on {self.device} in {count}, autocast to {self.dtype}")
            barrier()
            if config.deterministic:
                self._stack.enter_context(deterministic_algorithms())
            torch.manual_seed(config.seed)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _begun(self) -> bool:
        """Whether the run has checkpoints or a log, which must not be mixed with those of another config."""
        log = self.out / "log.jsonl"
        return Checkpoints(self.out / "checkpoints").latest() is not None or (log.exists() and log.stat().st_size > 0)

    def _data(self) -> Replay:
        if self.replay is None:
            self.replay = Replay(self.config.data)
        return self.replay

    def sampler(self) -> ClipSampler:
        """A sampler of this process's clips, from the levels to train on."""
        config, replay = self.config, self._data()
        training, _ = split_levels(replay, config.held_out, seed=config.seed)
        part = (self.rank, self.processes)
        return ClipSampler(replay, config.clip, config.batch, seed=config.seed, episodes=training, part=part)

    def held_out_clips(self, count: int = 4) -> dict[str, Tensor]:
        """`count` clips of the levels that are not trained on, the same in every process."""
        replay = self._data()
        _, held_out = split_levels(replay, self.config.held_out, seed=self.config.seed)
        clips = ClipSampler(replay, self.config.clip, count, seed=self.config.seed, episodes=held_out).batch(0)
        return {name: value.to(self.device) for name, value in clips.items()}

    def fit(
        self,
        objective: Objective,
        sampler: Sampler,
        *,
        held_out: dict[str, Tensor] | None = None,
        stop_after: int | None = None,
    ) -> None:
        """Train, from the newest checkpoint if there is one.

        SIGTERM and SIGINT (Ctrl-C) save a checkpoint after the current step and raise SystemExit. A second Ctrl-C ends
        a run of one process at once.

        Args:
            objective: the module to train.
            sampler: where clips come from, as `sampler()` returns.
            held_out: clips to validate on, on the trainer's device.
            stop_after: stop after this step and write a checkpoint, as if the run were killed right after it.
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
            signals = stack.enter_context(deferred_signals(single=self.processes == 1))
            batches: Any = sampler.batches(first, last, config.workers)
            stack.callback(batches.close)
            began = time.perf_counter()
            for step in range(first, last):
                waits_from = time.perf_counter()
                clips = next(batches)
                waited = time.perf_counter() - waits_from
                row, stop = run.step(step, clips, bool(signals))
                # From the end of one step to the end of the next, so that waiting for data is included.
                seconds, began = time.perf_counter() - began, time.perf_counter()
                row |= {
                    "frames_per_second": config.frames_per_step / seconds,
                    "seconds": seconds,
                    "data_wait": waited / seconds,
                }
                pictures: dict[str, Tensor] = {}
                if held_out is not None and config.look_every and (step + 1) % config.look_every == 0:
                    row["held_out"], pictures = run.validate(held_out)
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
                raise SystemExit(128 + signals[0])  # A signal that came while the last checkpoint was saved.

    def _viewers(self, first: int) -> list[Viewer]:
        viewers: list[Viewer] = []
        if self.config.tensorboard:
            viewers.append(TensorBoard(self.out / "tensorboard", first))
        if self.config.wandb:
            viewers.append(WeightsAndBiases(self.out, dataclasses.asdict(self.config)))
        return viewers


def train_on_replay(
    objective_of: Callable[[Config], TrainedObjective],
    config: Config,
    out: Path,
    progress: bool,
    stop_after: int | None,
) -> TrainedObjective:
    """Train the objective of `config` on config.data, with validation on held-out clips; returns it."""
    with Trainer(config, out, progress=progress) as trainer:
        objective = objective_of(config)
        held_out = trainer.held_out_clips() if config.look_every else None
        trainer.fit(objective, trainer.sampler(), held_out=held_out, stop_after=stop_after)
    return objective


def load_trained(
    kind: type[Config], objective_of: Callable[[Config], TrainedObjective], run: Path
) -> tuple[TrainedObjective, Config, int]:
    """The trained objective of a run (its moving average, where it keeps one), its config and its step."""
    config, _ = read(kind, run)
    objective = objective_of(config)
    step = load_weights(objective, run, averaged=config.ema > 0)
    return objective, config, step


def load_weights(objective: Objective, run: Path, *, averaged: bool) -> int:
    """Fill the weights of `objective` from a run's newest checkpoint; returns its step."""
    checkpoints = Checkpoints(Path(run) / "checkpoints")
    state = {"model": objective.state_dict()}
    if averaged:
        # Only parameters are averaged; buffers are not.
        state["average"] = {name: p.detach().clone() for name, p in objective.named_parameters()}
    while True:
        step = checkpoints.latest()
        if step is None:
            raise FileNotFoundError(f"{run} has no checkpoint: train first")
        try:
            checkpoints.load(state, step)
            break
        except ValueError:
            # A run that is training may have replaced it by newer ones meanwhile.
            if step in checkpoints.steps():
                raise
    if averaged:
        objective.load_state_dict(state["average"], strict=False)
    return step


class Run:
    """What one process of a run trains: module, optimiser and moving average."""

    def __init__(self, trainer: Trainer, objective: Objective) -> None:
        self.trainer, self.config, self.objective = trainer, trainer.config, objective
        # `module` is what to call; `objective` holds the weights, or this process's shards of them.
        self.module = distribute(objective, self.config.parallel)
        self.optimiser = torch.optim.AdamW(
            parameter_groups(objective, self.config.weight_decay), lr=self.config.lr, betas=(0.9, 0.95), fused=True
        )
        self.average = MovingAverage(objective, self.config.ema) if self.config.ema else None

    def step(self, step: int, clips: dict[str, Tensor], terminated: bool) -> tuple[dict[str, Any], bool]:
        """One optimiser step. Returns its row of the log, and whether any process got a signal to stop."""
        config, device = self.config, self.trainer.device
        torch.manual_seed(seed_of(config.seed, step, self.trainer.rank))
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate(step)
        self.optimiser.zero_grad(set_to_none=True)
        self.objective.begin_step(step)
        clips = {**clips, **self.objective.random_inputs(clips)}
        columns = {name: value.chunk(config.accumulate) for name, value in clips.items()}
        parts = [{name: column[i] for name, column in columns.items()} for i in range(config.accumulate)]
        totals: list[Tensor] = []
        figures_of_parts: list[dict[str, Tensor]] = []
        for i, (part, shares) in enumerate(zip(parts, self._shares(parts), strict=True), start=1):
            part = {name: value.to(device, non_blocking=True) for name, value in part.items()}
            with gradient_sync(self.module, i == len(parts)):
                with self._autocast():
                    total, figures = self.module(part, shares)
                (total / len(parts) if len(parts) > 1 else total).backward()
            totals.append(total.detach())
            figures_of_parts.append(figures)
        norm = gathered(nn.utils.clip_grad_norm_(self.objective.parameters(), config.clip_norm))

        shapes = {name: value.shape for name, value in figures_of_parts[0].items()}
        rows = [
            torch.cat([total.view(1), *(figures[name].flatten() for name in shapes)])
            for total, figures in zip(totals, figures_of_parts, strict=True)
        ]
        stop = torch.full((1,), float(terminated), device=device)
        loss, *values, stopping = mean_over_processes(torch.cat([torch.stack(rows).mean(0), stop])).tolist()
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
        return row, stopping > 0

    def validate(self, clips: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        self.objective.eval()
        with self._autocast():
            found = self.objective.validate(clips)
        self.objective.train()
        return found

    def _autocast(self) -> torch.autocast:
        dtype = self.trainer.dtype
        return torch.autocast(self.trainer.device.type, dtype, enabled=dtype != torch.float32)

    def _shares(self, parts: list[dict[str, Tensor]]) -> list[Tensor | None]:
        """Each part's shares of the means over all parts, of all processes."""
        if self.trainer.parts == 1 or self.objective.counts(parts[0]) is None:
            return [None] * len(parts)
        counts: list[Any] = [self.objective.counts(part) for part in parts]
        stacked = torch.stack(counts).to(self.trainer.device, torch.float64)
        total = sum_over_processes(stacked.sum(0))
        return list((self.trainer.parts * stacked / total.clamp_min(1)).float())

    def state(self, step: int) -> dict[str, Any]:
        """All that the steps after `step` depend on."""
        # Imported here and in `resume`: it takes as long to import as torch itself.
        from torch.distributed.checkpoint.state_dict import get_state_dict

        weights, moments = get_state_dict(self.objective, self.optimiser)
        state = {"model": weights, "optimiser": moments, "step": torch.tensor(step)}
        if self.average is not None:
            state["average"] = self.average.averages
        return state

    def resume(self, checkpoints: Checkpoints) -> int:
        """Load the newest checkpoint and return the step to continue from; 0 if there is none."""
        latest = checkpoints.latest()
        if latest is None:
            return 0
        from torch.distributed.checkpoint.state_dict import set_state_dict

        state = self.state(0)
        checkpoints.load(state, latest)
        set_state_dict(
            self.objective, self.optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"]
        )
        return int(state["step"])


def seed_of(*numbers: int) -> int:
    """A seed derived from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def autocast_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a config's `dtype` means on this device."""
    if name == "auto":
        name = "bfloat16" if device.type != "cpu" or multiplies_bf16() else "float32"
    return torch.float32 if name == "float32" else torch.bfloat16


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """torch's deterministic mode, restored afterwards."""
    # cuBLAS needs a fixed workspace for this mode, and reads the variable when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def deferred_signals(*, single: bool) -> Iterator[list[signal.Signals]]:
    """A list that collects SIGTERM and SIGINT instead of handling them. In a thread other than the main one, which may
    not handle signals, it stays empty.

    single: the run has one process, so a second SIGINT raises KeyboardInterrupt at once. With several, each
    receives one Ctrl-C twice, from the terminal and from torchrun, so the second must not count.
    """
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        if number == signal.SIGINT and single:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
