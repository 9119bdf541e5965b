"""mfwm demo: collects frames, trains and evaluates a world model, on pixels or on tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mfwm_kernels import arguments as check

from .data.place import entries_of, restore
from .presets import DEMO, TOKENS
from .training.checkpoints import write_atomically


@dataclass
class Demo:
    """Collect frames of a game, train a world model and evaluate it. A repeated command continues where one stopped.

    results.json gets the figures and the seconds that each stage took.
    """

    out: Path | None = None
    """By default runs/demo, or runs/demo-tokens with --tokens."""
    data: Path = Path("data/demo")
    frames: int = 24_000
    tokens: bool = False
    """Train a tokenizer first, and then a world model on its ids."""
    steps: int | None = None
    """Training steps of the world model."""
    tokenizer_steps: int | None = None
    """Training steps of the tokenizer."""

    def run(self) -> None:
        from .data.collect import collect, default_environment

        for name in ("steps", "tokenizer_steps"):
            if (steps := getattr(self, name)) is not None:
                check.integer(name, steps, least=1)
        began = time.perf_counter()
        complete(self.data, lambda: collect(default_environment(), self.frames, self.data))
        out = self.out or Path("runs/demo-tokens" if self.tokens else "runs/demo")
        results = self._tokens(out) if self.tokens else self._pixels(out)
        # Stages that an earlier command finished are not included.
        results["seconds"]["this_command"] = time.perf_counter() - began
        results["seconds"]["collect"] = seconds_to_complete(self.data)
        write_atomically(out / "results.json", json.dumps(results, indent=2).encode())
        print("seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in results["seconds"].items()))

    def _pixels(self, out: Path) -> dict[str, Any]:
        from .data.replay import Replay
        from .evaluation.report import write_report
        from .evaluation.world_model import evaluate
        from .training.world_model import for_replay, train

        config = replace(DEMO, data=str(self.data), steps=DEMO.steps if self.steps is None else self.steps)
        train(for_replay(config, Replay(self.data)), out)
        # Two thirds of the default clips keep the whole demo within ten minutes.
        metrics = evaluate(out, clips=64)
        for k in metrics["psnr"]:
            print(f"n + {k}: {metrics['psnr'][k]:.2f} dB, persistence {metrics['persistence_psnr'][k]:.2f} dB")
        if "delta_psnr" in metrics:
            print(f"true minus shuffled actions: {metrics['delta_psnr']:+.2f} dB")
        print(f"report: {write_report(out)}")
        return {"world_model": metrics, "seconds": stage_seconds(metrics)}

    def _tokens(self, out: Path) -> dict[str, Any]:
        from .data.replay import Replay
        from .encode import encode
        from .evaluation.report import write_report
        from .evaluation.tokenizer import evaluate_tokenizer
        from .evaluation.world_model import evaluate
        from .training.tokenizer import TokenizerTraining, for_pixels, train_tokenizer
        from .training.world_model import for_replay, train

        tokenizer, ids, model = out / "tokenizer", out / "ids", out / "model"
        steps = TokenizerTraining.steps if self.tokenizer_steps is None else self.tokenizer_steps
        train_tokenizer(for_pixels(TokenizerTraining(str(self.data), steps)), tokenizer)
        frames = evaluate_tokenizer(tokenizer)
        complete(ids, lambda: encode(self.data, ids, tokenizer=tokenizer))
        config = replace(TOKENS, data=str(ids), steps=TOKENS.steps if self.steps is None else self.steps)
        train(for_replay(config, Replay(ids)), model)
        metrics = evaluate(model)
        print(f"tokenizer reconstructs held-out frames at {frames['psnr']:.2f} dB")
        for k, bits in metrics["bits_per_token"].items():
            print(f"n + {k}: {bits:.2f} bits per token; entropy of the tokens {frames['bits_per_token']:.2f}")
        for step in (1, 4, len(metrics["rollout_psnr"])):
            rolled, persistence, best = (
                metrics[f"{name}rollout_psnr"][step - 1] for name in ("", "persistence_", "tokenised_")
            )
            print(f"step {step}: {rolled:.2f} dB, persistence {persistence:.2f} dB, true tokens {best:.2f} dB")
        if "delta_psnr" in metrics:
            print(f"true minus shuffled actions: {metrics['delta_psnr']:+.2f} dB")
        print(f"report: {write_report(model)}")
        seconds = {
            "tokenizer": frames["training_seconds"],
            "encode": seconds_to_complete(ids),
            **stage_seconds(metrics),
        }
        return {"tokenizer": frames, "world_model": metrics, "seconds": seconds}


def stage_seconds(metrics: dict[str, Any]) -> dict[str, float]:
    return {"training": metrics["training_seconds"], "evaluation": metrics["evaluation_seconds"]}


def complete(folder: Path, write: Callable[[], None]) -> None:
    """Write the replay buffer in `folder` unless it exists. The file `complete` in it says how long that took."""
    restore(folder)
    if not folder.exists() or not any(entries_of(folder)):
        began = time.perf_counter()
        write()
        write_atomically(folder / "complete", f"{time.perf_counter() - began:.1f}\n".encode())


def seconds_to_complete(folder: Path) -> float:
    """How long `complete` took to write the set; 0 if something else wrote it."""
    path = folder / "complete"
    return float(path.read_text()) if path.exists() else 0.0
