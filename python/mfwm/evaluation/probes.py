"""What a linear map reads from the hidden state: where objects are and how they move, at n, n + 1 and n + 8.

Ridge regression in closed form, in fp64, from the hidden state that the horizons share, at position n, with all tokens
side by side. It is fitted on clips of training levels and measured on held-out ones. A position at n + 8 that can be
read from position n is one that the model foresees, whether or not its pictures show it.

Letters: N hidden states, F features, O objects, Y targets, G grid tokens, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.replay import Clips, Replay
from ..models.world_model import WorldModel
from .positions import objects_of, positions

LEADS = (0, 1, 8)
# Clips to fit on and to measure on, and hidden states of each. With 2,048 features (width 128, 4 x 4 tokens) this takes
# 17 s of one thread; half as many clips read positions of balls a fifth less precisely.
CLIPS, HELD_OUT_CLIPS, STATES = 1200, 200, 6
MOST_FEATURES = 4096
# Of the mean squared feature, 1.
PENALTIES = tuple(10.0**k for k in range(-4, 2))
# An object that is visible in fewer of the hidden states' frames is left out.
LEAST_ROWS = 50


def probe(
    model: WorldModel, replay: Replay, trained: np.ndarray, held_out: np.ndarray, *, seed: int, batch: int = 8
) -> dict[str, Any] | None:
    """{"position": {"0": {"r2", "mae"}, "1": ..., "8": ...}, "velocity": ...}; mae in pixels, and in pixels per frame.

    trained, held_out: episodes. None if the set has no objects in pixels, or no episode of either is long enough.
    r2: 1 - squared error / variance on held-out clips, both summed over coordinates; mae: mean over coordinates.
    """
    objects, length = objects_of(replay), 1 + model.config.context + LEADS[-1]
    if not objects or min(replay.episode_lengths[part].max() for part in (trained, held_out)) < length:
        return None
    draw = np.random.default_rng(seed)
    parts = []
    for episodes, count in ((trained, CLIPS), (held_out, HELD_OUT_CLIPS)):
        clips = Clips(replay, length, episodes=episodes, within_episode=True)
        chosen = np.sort(draw.choice(len(clips), size=min(count, len(clips)), replace=False))
        parts.append(samples(model, clips, chosen, objects, batch))
    (x_NF, targets, episode_N), (x_held, held, _) = parts
    errors = probed(x_NF, targets, episode_N, x_held, held, draw)
    return {
        kind: {str(lead): errors[kind, lead] for lead in LEADS if (kind, lead) in errors}
        for kind in ("position", "velocity")
    }


Targets = dict[tuple[str, int], np.ndarray]


def samples(
    model: WorldModel, clips: Clips, chosen: np.ndarray, objects: dict[str, tuple[int, int]], batch: int
) -> tuple[np.ndarray, Targets, np.ndarray]:
    """Hidden states [N, F] of these clips, their targets [N, O, 2] by kind and lead, and their episodes [N].

    The model sees the frames from the second on, because a velocity may need the frame before. The hidden states are
    those of up to STATES positions of the second half of the context.
    """
    context, device = model.config.context, model.token_position.device
    at = np.unique(np.linspace(context // 2, context - 1, STATES).round().astype(np.int64))
    found = []
    for indices in np.array_split(chosen, -(-len(chosen) // batch)):
        seen = {name: x[:, 1 : 1 + context].to(device) for name, x in clips.batch(indices).items()}
        with torch.no_grad():
            hidden = model.states(seen["video"], seen["actions"], seen["segment_ids"])["hidden"][:, at]
        found.append(features(hidden.flatten(2).flatten(0, 1)))
    frames = clips.frames[clips.starts[chosen][:, None] + 1 + at].reshape(-1)
    targets = {}
    for lead in LEADS:
        targets["position", lead] = positions(clips.replay, frames + lead, list(objects.values())).astype(np.float64)
        targets["velocity", lead] = velocities(clips.replay, frames + lead, objects).astype(np.float64)
    return torch.cat(found).double().cpu().numpy(), targets, clips.segment_ids[clips.starts[chosen]].repeat(len(at))


def velocities(replay: Replay, frames: np.ndarray, objects: dict[str, tuple[int, int]]) -> np.ndarray:
    """[N, O, 2] in pixels per frame: NAME_vx and NAME_vy of the state where it has them in that unit, else the
    difference to the position one frame before."""
    units = dict(zip(replay.state_names, replay.attributes["state_units"], strict=True))
    places = list(objects.values())
    found = positions(replay, frames, places) - positions(replay, frames - 1, places)
    for number, name in enumerate(objects):
        names = (f"{name}_vx", f"{name}_vy")
        if all(units.get(column) == "pixels/frame" for column in names):
            columns = (replay.state_names.index(names[0]), replay.state_names.index(names[1]))
            found[:, number] = positions(replay, frames, [columns])[:, 0]
    return found


def features(hidden: Tensor) -> Tensor:
    """[N, F] from [N, G * D]: the same, or at most MOST_FEATURES sums of it with random signs.

    A matrix with a single 1 or -1 in each row keeps inner products on average, and costs no memory.
    """
    count = hidden.shape[1]
    hidden = hidden.float()
    if count <= MOST_FEATURES:
        return hidden
    draw = np.random.default_rng(0)
    signs = torch.from_numpy(draw.choice(np.array([-1, 1], np.float32), count)).to(hidden)
    place = torch.from_numpy(draw.integers(MOST_FEATURES, size=count)).to(hidden.device)
    return hidden.new_zeros(len(hidden), MOST_FEATURES).index_add_(1, place, hidden * signs)


def probed(
    x_NF: np.ndarray,
    targets: Targets,
    episode_N: np.ndarray,
    x_held: np.ndarray,
    held: Targets,
    draw: np.random.Generator,
) -> dict[tuple[str, int], dict[str, float]]:
    """r2 and mae on held-out states by kind and lead. The penalty is chosen for each of them, on a fifth of the
    episodes. Coordinates that are constant are left out."""
    keys = list(targets)
    # Objects that are visible in the same rows share a regression.
    visible_NO = np.all([~np.isnan(values).any(-1) for values in targets.values()], axis=0)
    groups: dict[bytes, list[int]] = {}
    for number, column in enumerate(visible_NO.T):
        if column.sum() >= LEAST_ROWS:
            groups.setdefault(column.tobytes(), []).append(number)
    episodes = draw.permutation(np.unique(episode_N))
    chosen_N = np.isin(episode_N, episodes[: max(1, len(episodes) // 5)])
    if len(episodes) == 1:
        chosen_N = np.arange(len(episode_N)) >= 0.8 * len(episode_N)
    residuals: dict[tuple[str, int], list[np.ndarray]] = {key: [] for key in keys}
    deviations: dict[tuple[str, int], list[np.ndarray]] = {key: [] for key in keys}
    for numbers in groups.values():
        rows = visible_NO[:, numbers[0]]
        x, chosen = x_NF[rows], chosen_N[rows]
        # [N, kinds and leads, coordinates]
        y, y_held = (
            np.stack([part[key][:, numbers].reshape(len(part[key]), -1) for key in keys], 1) for part in (targets, held)
        )
        y = y[rows]
        penalties = best_penalties(x, y, chosen)
        predicted = ridge(x, y.reshape(len(y), -1), x_held, sorted(set(penalties)))
        for i, (key, penalty) in enumerate(zip(keys, penalties, strict=True)):
            at = predicted[penalty].reshape(y_held.shape)[:, i]
            for column in range(y.shape[2]):
                truth = y_held[:, i, column]
                known = ~np.isnan(truth)
                if np.ptp(y[:, i, column]) and known.any():
                    residuals[key].append((at[:, column] - truth)[known])
                    deviations[key].append(truth[known] - truth[known].mean())
    found = {}
    for key in keys:
        if residuals[key]:
            residual, deviation = np.concatenate(residuals[key]), np.concatenate(deviations[key])
            with np.errstate(divide="ignore", invalid="ignore"):
                r2 = 1 - np.square(residual).sum() / np.square(deviation).sum()
            found[key] = {"r2": float(r2), "mae": float(np.abs(residual).mean())}
    return found


def best_penalties(x: np.ndarray, y: np.ndarray, chosen: np.ndarray) -> list[float]:
    """For each entry of axis 1 of y [N, keys, coordinates], the penalty with the least squared error on `chosen` rows,
    fitted on the others. The middle one if either are none."""
    if chosen.all() or not chosen.any():
        return [PENALTIES[len(PENALTIES) // 2]] * y.shape[1]
    predicted = ridge(x[~chosen], y[~chosen].reshape((~chosen).sum(), -1), x[chosen], PENALTIES)
    errors = [np.square(predicted[p].reshape(y[chosen].shape) - y[chosen]).sum((0, 2)) for p in PENALTIES]
    return [PENALTIES[best] for best in np.argmin(errors, axis=0)]


def ridge(x_NF: np.ndarray, y_NY: np.ndarray, at: np.ndarray, penalties: Any) -> dict[float, np.ndarray]:
    """Predictions at `at` [M, F] by penalty: of w with least mean |x w - y|^2 + penalty |w|^2, for standardised x and
    centred y."""
    mean, scale, middle = x_NF.mean(0), x_NF.std(0), y_NY.mean(0)
    # A feature that is constant says nothing.
    scale = np.where(scale > 1e-9 * np.abs(mean).max(initial=1.0), scale, np.inf)
    z, z_at = (torch.from_numpy((x - mean) / scale) for x in (x_NF, at))
    gram, product = z.T @ z / len(z), z.T @ torch.from_numpy(y_NY - middle) / len(z)
    found = {}
    for penalty in penalties:
        factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype))
        found[penalty] = (z_at @ torch.cholesky_solve(product, factor)).numpy() + middle
    return found
