"""How well a tokenizer reconstructs frames that it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mfwm_kernels import video_pyramid

from ..metrics.intervals import check_draw
from ..metrics.quality import check_size, psnr, similarity, squared_error
from ..models.world_model import parameters_of
from ..training.run_config import read
from ..training.run_log import column, read_log
from ..training.tokenizer import TokenizerTraining, load_tokenizer, smaller
from .held_out import HeldOut, device_for_evaluation, write_metrics


def evaluate_tokenizer(
    run: Path, *, data: str | Path | None = None, clips: int = 96, batch: int = 8, seed: int = 0
) -> dict[str, Any]:
    """PSNR and SSIM of reconstructed held-out frames; writes metrics.json into the run and returns it.

    data: where the run's data set is, if it was moved.
    """
    run = Path(run)
    check_draw(clips=clips, batch=batch, seed=seed)
    config, digest = read(TokenizerTraining, run)
    check_size(config.model.frame)
    log = run / "log.jsonl"
    seconds = sum(column(read_log(log), "seconds", log))
    held_out = HeldOut(
        config,
        digest,
        data,
        length=config.clip,
        count=clips,
        draw=np.random.default_rng(seed),
        within_episode=False,
    )
    device = device_for_evaluation()
    model, _, step = load_tokenizer(run)
    model = model.to(device)
    errors, similarities, used = [], [], np.zeros(config.model.vocabulary)
    for indices in held_out.batches(batch):
        part = held_out.read(indices, device)
        ids = model.encode(smaller(part["video"], config.factor), part["segment_ids"])
        frames = model.decode(ids, part["segment_ids"])
        (truth,) = video_pyramid(part["video"], (config.factor,), dtype=torch.float32)
        errors.append(squared_error(frames, truth).cpu().numpy())
        similarities.append(similarity(frames, truth))
        used += np.bincount(ids.flatten().cpu(), minlength=len(used))
    share = used[used > 0] / used.sum()
    metrics = {
        "psnr": float(psnr(np.concatenate(errors).mean())),
        "ssim": float(np.concatenate(similarities).mean()),
        "vocabulary": config.model.vocabulary,
        "ids_used": len(share),
        "bits_per_token": float(-(share * np.log2(share)).sum()),
        "tokens_per_frame": int(np.prod(config.model.grid)),
        "steps": step,
        "training_seconds": seconds,
        "parameters": parameters_of(model),
        **held_out.summary(),
    }
    return write_metrics(run, metrics)
