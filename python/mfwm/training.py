"""mfwm train: a run directory with config.json, log.jsonl and checkpoints/; killed or not, it goes on where it was.

The batch of a step depends on (seed, step) alone: the step is the position in the data, and a resumed run equals an
uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

from mfwm_kernels import Horizons
from mfwm_kernels.cpu import product_dtype

from .checkpoints import Checkpoints, write_atomically
from .data import ClipSampler, Replay, split_levels
from .heads import HeadsConfig
from .model import WorldModel, WorldModelConfig


@dataclass(frozen=True)
class TrainingConfig:
    """One training run.

    data: a replay directory that `mfwm collect` wrote.
    steps: optimiser steps.
    batch: clips in a step.
    clip: frames in a clip; those past the model's context are targets only, so that the last positions have theirs too.
    lr: peak learning rate, after `warmup` steps; it then falls along a cosine to a tenth.
    weight_decay: of matrices; vectors and embeddings have none.
    clip_norm: the largest gradient norm that is not scaled down.
    dtype: of autocast, "bfloat16" or "float32"; "auto" is bfloat16 except on a CPU that does not multiply it in
        hardware, where it would be tens of times slower than float32.
    seed: of weights and batches.
    held_out: the share of levels kept for validation, never trained on.
    checkpoint_every: steps between checkpoints; one is also written at the end.
    keep: the number of checkpoints that stay, the newest.
    """

    data: str
    steps: int = 600
    batch: int = 8
    clip: int = 24
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    dtype: str = "auto"
    seed: int = 0
    held_out: float = 0.1
    checkpoint_every: int = 100
    keep: int = 2
    model: WorldModelConfig = field(default_factory=WorldModelConfig)

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype must be 'auto', 'bfloat16' or 'float32', got {self.dtype!r}")
        shortest = max(5, 1 + min(self.model.heads.horizons.offsets))
        if self.clip < shortest:
            raise ValueError(f"clip must be >= {shortest} (four frames to see and one to roll out), got {self.clip}")
        for name in ("steps", "batch", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


def autocast_dtype(name: str, device: torch.device) -> torch.dtype:
    """What a `dtype` of the config means on this device."""
    if name == "auto":
        return product_dtype(torch.bfloat16) if device.type == "cpu" else torch.bfloat16
    return torch.float32 if name == "float32" else torch.bfloat16


def train(config: TrainingConfig, out: Path, *, progress: bool = True, stop_after: int | None = None) -> WorldModel:
    """Train in `out`, or go on where a run with the same config stopped. Returns the model.

    SIGTERM saves a checkpoint after the step in progress, and SystemExit follows.

    stop_after: leave off after this step, as a killed run would with its checkpoint just written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settle_config(config, out / "config.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    model = WorldModel(config.model).to(device)
    optimiser = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=(0.9, 0.95), fused=True
    )
    replay = Replay(config.data)
    training, _ = split_levels(replay, config.held_out, seed=config.seed)
    sampler = ClipSampler(replay, config.clip, config.batch, seed=config.seed, episodes=training)

    checkpoints = Checkpoints(out / "checkpoints", config.keep)
    first = resume(checkpoints, model, optimiser)
    log = Log(out / "log.jsonl", first)
    last = config.steps if stop_after is None else min(config.steps, stop_after)
    bar = tqdm(total=config.steps, initial=first, desc="train", unit="step", disable=not progress, dynamic_ncols=True)
    dtype = autocast_dtype(config.dtype, device)
    model.train()
    began = time.perf_counter()
    with closing(log), bar, sigterm_noticed() as terminated:
        for step, clips in zip(range(first, last), sampler.batches(first, last), strict=True):
            clips = {name: value.to(device) for name, value in clips.items()}
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config, step)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(clips["video"], clips["actions"], clips["segment_ids"])
            optimiser.zero_grad(set_to_none=True)
            loss.total.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            if not torch.isfinite(norm):
                raise FloatingPointError(
                    f"step {step}: the gradient norm is {norm.item()}; the loss {loss.total.item()}, "
                    f"per horizon {loss.per_horizon.tolist()}"
                )
            optimiser.step()
            # From the end of one step to the end of the next, so that waiting for data counts.
            seconds, began = time.perf_counter() - began, time.perf_counter()
            row = {
                "step": step,
                "loss": loss.total.item(),
                "per_horizon": loss.per_horizon.tolist(),
                "consistency": loss.consistency.tolist(),
                "gradient_norm": norm.item(),
                "lr": learning_rate(config, step),
                "frames_per_second": config.batch * min(config.clip, config.model.context) / seconds,
            }
            log.write(row)
            bar.set_postfix(loss=f"{row['loss']:.4f}", frames_s=f"{row['frames_per_second']:.0f}", refresh=False)
            bar.update()
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == last or terminated.is_set():
                checkpoints.save(training_state(model, optimiser, step + 1), step + 1)
            if terminated.is_set():
                raise SystemExit(128 + signal.SIGTERM)
    return model


@contextmanager
def sigterm_noticed() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; Python lets only the main thread handle signals, others leave them as they are."""
    noticed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noticed
        return
    before = signal.signal(signal.SIGTERM, lambda *_: noticed.set())
    try:
        yield noticed
    finally:
        signal.signal(signal.SIGTERM, before)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up, then a cosine from lr to lr / 10."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in matrices], "weight_decay": 0.0},
    ]


def settle_config(config: TrainingConfig, path: Path) -> None:
    """Write the run's config, or make sure that it is the one already there."""
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    if not path.exists():
        write_atomically(path, json.dumps(wanted, indent=2).encode())
        return
    for name, (old, new) in differences(json.loads(path.read_text()), wanted).items():
        raise ValueError(
            f"{name} is {new!r}, but the run in {path.parent} was begun with {old!r}; choose another --out"
        )


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in {**old, **new}:
            found |= differences(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name)
        return found
    return {} if old == new else {prefix: (old, new)}


def load_config(run: Path) -> TrainingConfig:
    """The config that a run was begun with."""
    raw = json.loads((Path(run) / "config.json").read_text())
    model = raw.pop("model")
    heads = model.pop("heads")
    horizons = heads.pop("horizons")
    heads = HeadsConfig(Horizons(horizons["offsets"], horizons["factors"]), **as_tuples(heads))
    return TrainingConfig(**raw, model=WorldModelConfig(**as_tuples(model), heads=heads))


def as_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where the configs have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def training_state(model: WorldModel, optimiser: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """All that the steps after `step` depend on."""
    weights, moments = get_state_dict(model, optimiser)
    state = {"model": weights, "optimiser": moments, "step": torch.tensor(step), "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


def resume(checkpoints: Checkpoints, model: WorldModel, optimiser: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint and return the step to go on from; 0 where there is none."""
    latest = checkpoints.latest()
    if latest is None:
        return 0
    state = training_state(model, optimiser, 0)
    checkpoints.load(state, latest)
    set_state_dict(model, optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"])
    return int(state["step"])


class Log:
    """log.jsonl, one row a step; rows of steps that will be run again are dropped when a run goes on."""

    def __init__(self, path: Path, first: int) -> None:
        kept = [row for row in read_log(path) if row["step"] < first] if path.exists() else []
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = open(path, "a")

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a log; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def load_model(run: Path) -> tuple[WorldModel, TrainingConfig, int]:
    """The trained model of a run, its config and the step it stands at."""
    config = load_config(run)
    model = WorldModel(config.model)
    checkpoints = Checkpoints(Path(run) / "checkpoints")
    step = checkpoints.latest()
    if step is None:
        raise FileNotFoundError(f"{run} holds no checkpoint: train first")
    checkpoints.load({"model": model.state_dict()}, step)
    return model.eval(), config, step
