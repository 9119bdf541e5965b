"""What the codes of a latent action model tell about frames that it was not trained on.

Delta-PSNR (Genie, arXiv 2402.15391): the PSNR of the next frame given the inferred codes, minus that given random ones.
Above 0, the decoder uses the codes. The random codes are the inferred ones in a random order: as frequent, and wrong.
Mutual information with the true actions, in bits: where it exceeds that of the random codes, codes and actions are
related.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mfwm_kernels import video_pyramid

from ..metrics.intervals import check_draw, interval
from ..metrics.quality import psnr, squared_error
from ..models.world_model import parameters_of
from ..training.latent_actions import LatentActionsTraining, load_latent_actions
from ..training.run_config import read
from .held_out import HeldOut, device_for_evaluation, write_metrics


def evaluate_latent_actions(
    run: Path, *, data: str | Path | None = None, clips: int = 256, batch: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Delta-PSNR and mutual information on held-out clips; writes metrics.json into the run and returns it.

    data: where the run's data set is, if it was moved.
    """
    run = Path(run)
    check_draw(clips=clips, batch=batch, seed=seed)
    config, digest = read(LatentActionsTraining, run)
    draw = np.random.default_rng(seed)
    length = min(config.clip, config.model.context + 1)
    held_out = HeldOut(config, digest, data, length=length, count=clips, draw=draw)
    device = device_for_evaluation()
    model, _, step = load_latent_actions(run)
    model = model.to(device)
    held_out.chosen.sort()
    parts = [held_out.clips.batch(indices) for indices in held_out.batches(batch)]
    inferred = [model.infer(part["video"].to(device)).cpu() for part in parts]
    codes_BT = torch.cat(inferred)[:, :-1].numpy()
    shuffled_BT = draw.permutation(codes_BT.ravel()).reshape(codes_BT.shape)

    errors: dict[str, list[np.ndarray]] = {"inferred": [], "random": [], "persistence": []}
    for number, part in enumerate(parts):
        video = part["video"].to(device)
        (frames,) = video_pyramid(video, (1,))
        for name, codes in (("inferred", codes_BT), ("random", shuffled_BT)):
            given = torch.from_numpy(codes[number * batch : (number + 1) * batch]).to(device)
            predicted = model.predict(video[:, :-1], given)
            errors[name].append(squared_error(predicted, frames[:, 1:]).cpu().numpy())
        errors["persistence"].append(squared_error(frames[:, :-1], frames[:, 1:]).cpu().numpy())
    of_clips = {name: np.concatenate(values)[:, None] for name, values in errors.items()}
    means = {name: float(psnr(values.mean())) for name, values in of_clips.items()}
    metrics: dict[str, Any] = {
        "psnr": means["inferred"],
        "random_codes_psnr": means["random"],
        "persistence_psnr": means["persistence"],
        "delta_psnr": means["inferred"] - means["random"],
        "delta_psnr_95": interval(seed, lambda a, b: psnr(a) - psnr(b), of_clips["inferred"], of_clips["random"])[0],
        "codes": config.model.codes,
        "code_shares": (np.bincount(codes_BT.ravel(), minlength=config.model.codes) / codes_BT.size).tolist(),
        "code_entropy_bits": mutual_information(codes_BT.ravel(), codes_BT.ravel()),
        "steps": step,
        "parameters": parameters_of(model),
        **held_out.summary(),
    }
    if held_out.replay.actions:
        actions = torch.cat([part["actions"] for part in parts])[:, :-1].numpy().ravel()
        metrics |= {
            "mutual_information_bits": mutual_information(codes_BT.ravel(), actions),
            "mutual_information_of_random_codes_bits": mutual_information(shuffled_BT.ravel(), actions),
            "action_entropy_bits": mutual_information(actions, actions),
        }
    return write_metrics(run, metrics)


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information of two columns of small integers in bits, from their frequencies; of one with itself, its
    entropy. Chance alone puts it above 0, the more so the fewer rows there are."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())
