"""From pixels to tokens and inferred actions, and to a world model of them: training, encoding, evaluation."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import zarr
from mfwm import HeadsConfig, WorldModel, WorldModelConfig
from mfwm import encode as encode_module
from mfwm.data import Clips, Replay, ReplayWriter
from mfwm.data.check import check
from mfwm.encode import encode
from mfwm.evaluation import evaluate, evaluate_latent_actions, evaluate_tokenizer, write_report
from mfwm.evaluation.latent_actions import mutual_information
from mfwm.evaluation.tokens import Decoder, token_measures
from mfwm.models.latent_actions import LatentActionsConfig
from mfwm.models.tokenizer import TokenizerConfig
from mfwm.training import TrainingConfig, for_replay, train
from mfwm.training.data_identity import PIXELS_DIGEST, TOKENIZER_DIGEST, digest
from mfwm.training.latent_actions import (
    LatentActionsTraining,
    load_latent_actions,
    train_latent_actions,
)
from mfwm.training.run_config import read
from mfwm.training.run_log import read_log
from mfwm.training.tokenizer import (
    TokenizerTraining,
    for_pixels,
    load_tokenizer,
    train_tokenizer,
)
from small_run import moving_squares

from mfwm_kernels import Horizons, video_pyramid

SIZES: dict[str, Any] = {"patch": 4, "width": 32, "layers": 1, "head_width": 16}
SMALL_ACTIONS = LatentActionsConfig(**{**SIZES, "patch": 8}, context=6)
TRAINER: dict[str, Any] = {
    "held_out": 0.2,
    "warmup": 10,
    "dtype": "float32",
    "lr": 5e-3,
    "look_every": 50,
    "tensorboard": False,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Moving squares, a tokenizer of them and a latent action model."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("tokens")
    data = str(place / "data")
    moving_squares(place / "data")
    tokens = TokenizerConfig(**SIZES, levels=(5, 4, 3))
    train_tokenizer(
        for_pixels(TokenizerTraining(data, 100, 4, clip=6, model=tokens, **TRAINER)), place / "tok", progress=False
    )
    config = for_pixels(LatentActionsTraining(data, 250, 4, clip=7, model=SMALL_ACTIONS, **TRAINER))
    train_latent_actions(config, place / "lam", progress=False)
    return place


def test_held_out_frames_come_back(place: Path) -> None:
    validations = [row["held_out"]["psnr"][0] for row in read_log(place / "tok" / "log.jsonl") if "held_out" in row]
    assert validations[-1] > validations[0]
    metrics = evaluate_tokenizer(place / "tok", clips=16)
    replay = Replay(place / "data")
    grey = 10 * np.log10(4 / (replay.video / 127.5).var())
    assert metrics["psnr"] > grey + 3
    assert 2 < metrics["ids_used"] <= metrics["vocabulary"] == 60
    assert 1 < metrics["bits_per_token"] < np.log2(60) and metrics["held_out_levels"] == 2


def test_codes_tell_the_next_frame_and_the_true_action(place: Path) -> None:
    metrics = evaluate_latent_actions(place / "lam", clips=32)
    assert metrics["delta_psnr_95"][0] > 0.3 and metrics["psnr"] > metrics["persistence_psnr"]
    assert metrics["mutual_information_bits"] > metrics["mutual_information_of_random_codes_bits"] + 0.2
    assert metrics["mutual_information_bits"] <= metrics["code_entropy_bits"] <= 3
    assert sum(metrics["code_shares"]) == pytest.approx(1)


def test_mutual_information() -> None:
    a, b = np.array([0, 0, 1, 1]), np.array([0, 3, 0, 3])
    assert mutual_information(a, b) == pytest.approx(0)
    assert mutual_information(a, a) == mutual_information(a, 1 - a) == pytest.approx(1)
    # 3 of 4 agree: H(1/2) - H(1/4, 3/4 given each side).
    assert mutual_information(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])) == pytest.approx(0.311278)


def test_encoded_sets(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids and codes of episodes taken in pieces are those of whole episodes, beside the same levels."""
    monkeypatch.setattr(encode_module, "PIECE", 16)
    encode(place / "data", place / "both", tokenizer=place / "tok", latent_actions=place / "lam", progress=False)
    pixels, encoded = Replay(place / "data"), Replay(place / "both")
    assert encoded.frame == (1, 4, 4) and encoded.vocabulary == 60 and encoded.actions == 8
    assert np.array_equal(encoded.episode_ends, pixels.episode_ends)
    assert np.array_equal(encoded.episode_level, pixels.episode_level)
    tokens, codes = load_tokenizer(place / "tok")[0], load_latent_actions(place / "lam")[0]
    episode = torch.from_numpy(pixels.video[40:80]).permute(0, 3, 1, 2)[None]
    assert np.array_equal(encoded.video[40:80], tokens.encode(episode)[0])
    assert np.array_equal(encoded.action[40:80], codes.infer(episode)[0])
    encode(place / "data", place / "coded", latent_actions=place / "lam", progress=False)
    coded = Replay(place / "coded")
    assert np.array_equal(coded.video, pixels.video) and np.array_equal(coded.action, encoded.action)
    with pytest.raises(ValueError, match=r"data must be pixels, but .* holds tokens"):
        encode(place / "both", place / "again", tokenizer=place / "tok")
    with pytest.raises(ValueError, match="TokenizerConfig has no context: this is another kind of run"):
        encode(place / "data", place / "again", tokenizer=place / "lam")
    with pytest.raises(ValueError, match="give tokenizer, latent_actions or both"):
        encode(place / "data", place / "again")
    with pytest.raises(ValueError, match=r"was not encoded from .*: their episodes differ"):
        coded.attributes = {"pixels": str(place / "data"), "tokenizer": str(place / "tok")}
        coded.episode_ends = coded.episode_ends[1:]
        Decoder(coded, 6, np.arange(2), torch.device("cpu"))


def test_video_without_actions_trains_the_same_world_model(place: Path) -> None:
    """Its codes stand where actions would; tokens alone leave it without."""
    labelled = Replay(place / "data")
    writer = ReplayWriter(place / "plain", 16, 16, actions=None)
    for begin, end in zip(labelled.episode_starts, labelled.episode_ends, strict=True):
        writer.append(labelled.video[begin:end], None)
    config = for_pixels(LatentActionsTraining(str(place / "plain"), 2, 4, clip=7, model=SMALL_ACTIONS, **TRAINER))
    train_latent_actions(config, place / "plain_lam", progress=False)
    assert "mutual_information_bits" not in evaluate_latent_actions(place / "plain_lam", clips=4)
    encode(place / "plain", place / "plain_coded", latent_actions=place / "lam", progress=False)
    coded = Replay(place / "plain_coded")
    assert coded.actions == 8 and np.array_equal(coded.video, labelled.video)
    heads = HeadsConfig(Horizons((1, 2), (1, 2)))
    small = WorldModelConfig(patch=4, width=32, layers=1, heads=heads)
    training = TrainingConfig(str(place / "plain_coded"), 1, 4, clip=6, model=small, **TRAINER)
    model = train(for_replay(training, coded), place / "plain_run", progress=False)
    assert model.config.actions == 8
    encode(place / "plain", place / "plain_ids", tokenizer=place / "tok", progress=False)
    assert Replay(place / "plain_ids").action.shape == (480, 0)


def token_model(**options: Any) -> WorldModelConfig:
    heads = HeadsConfig(Horizons((1, 2, 4), (1, 2, 4)), output="tokens", vocabulary=60, **options)
    return WorldModelConfig((1, 4, 4), 1, 32, 2, 16, context=8, actions=4, heads=heads)


def test_bits_are_the_loss() -> None:
    """The bits per token are the loss, and the hits those of each cell's most likely id."""
    model = WorldModel(token_model())
    ids, actions = torch.randint(0, 60, (3, 12, 4, 4)), torch.randint(0, 4, (3, 12))
    clips = {"video": ids, "actions": actions, "segment_ids": torch.zeros(3, 12, dtype=torch.int64)}
    measures = token_measures(model, clips, actions.roll(1, 0))
    loss = model(ids, actions)
    torch.testing.assert_close(
        torch.from_numpy(measures["bits"] * np.log(2)).mean(0), loss.per_horizon, check_dtype=False
    )
    assert not np.allclose(measures["bits"], measures["bits_shuffled"])
    greedy = model.predict(ids, actions)[1].argmax(-1)
    enlarged = greedy.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert measures["hits"][:, 1] == pytest.approx((enlarged == ids[:, 2:10]).float().mean(dim=(1, 2, 3)).numpy())
    assert measures["hits_persistence"][:, 2] == pytest.approx(
        (ids[:, :8] == ids[:, 4:]).float().mean((1, 2, 3)).numpy()
    )


def test_a_world_model_of_tokens_is_trained_and_shown(place: Path) -> None:
    """At the trained tokenizer's quality: true tokens bound it, and untrained it keeps no picture."""
    encode(place / "data", place / "ids", tokenizer=place / "tok", progress=False)
    replay = Replay(place / "ids")
    config = TrainingConfig(str(place / "ids"), 3, 4, clip=12, model=token_model(blocks=(0, 1, 1)), **TRAINER)
    train(for_replay(config, replay), place / "run", progress=False)
    metrics = evaluate(place / "run", clips=6, batch=3, progress=False)
    assert list(metrics["bits_per_token"]) == list(metrics["accuracy"]) == ["1", "2", "4"]
    for k, (low, high) in metrics["bits_per_token_95"].items():
        assert low <= metrics["bits_per_token"][k] <= high
        low, high = metrics["accuracy_gain_95"][k]
        assert low <= metrics["accuracy"][k] - metrics["persistence_accuracy"][k] <= high
    true_tokens, model = np.array(metrics["tokenised_rollout_psnr"]), np.array(metrics["rollout_psnr"])
    assert true_tokens.shape == (32,) and (true_tokens > model).all()
    assert metrics["delta_psnr_step"] == 4 and "drift" in metrics
    page = write_report(place / "run").read_text()
    assert page.count("data:image/png;base64,") == 5 and "bits per token" in page
    picture = iio.imread(place / "run" / "rollout.gif")[-1]
    # The rows are separated by two white lines, enlarged.
    truth, greedy, sampled = (row[:-6] for row in np.split(np.pad(picture, ((0, 6), (0, 0), (0, 0))), 3))
    assert (truth != greedy).any() and (greedy != sampled).any()
    # The same figures when frames and tokenizer are somewhere else, if told where.
    moved = {"pixels": place / "data.moved", "tokenizer": place / "tok.moved"}
    for new in moved.values():
        os.rename(new.with_suffix(""), new)
    try:
        with pytest.raises(
            ValueError, match=r"the frames and the tokenizer of .*/ids must be where its attributes say"
        ):
            evaluate(place / "run", clips=6, batch=3, progress=False)
        again = evaluate(place / "run", **moved, clips=6, batch=3, progress=False)
        assert again["rollout_psnr"] == metrics["rollout_psnr"]
        assert write_report(place / "run", **moved).exists()
    finally:
        for new in moved.values():
            os.rename(new, new.with_suffix(""))
    with pytest.raises(ValueError, match=r"heads.vocabulary must be that of the data, 60 .*, got 61"):
        wrong = replace(config.model.heads, vocabulary=61)
        for_replay(replace(config, model=replace(config.model, heads=wrong)), replay)


@pytest.fixture(scope="module")
def low(place: Path) -> dict[int, Path]:
    """Tokenizers of the frames at a half and at a quarter of their size."""
    tokens = TokenizerConfig(**SIZES, levels=(5, 4, 3))
    for factor in (2, 4):
        config = TokenizerTraining(
            str(place / "data"),
            2,
            4,
            clip=6,
            factor=factor,
            model=tokens,
            **TRAINER,
        )
        train_tokenizer(for_pixels(config), place / f"tok{factor}", progress=False)
    return {factor: place / f"tok{factor}" for factor in (2, 4)}


def test_frames_are_encoded_at_every_size(place: Path, low: dict[int, Path], tmp_path: Path) -> None:
    metrics = evaluate_tokenizer(low[2], clips=4)
    assert metrics["tokens_per_frame"] == 4
    for name, options in (("both", {"low_tokenizers": tuple(low.values())}), ("plain", {})):
        encode(place / "data", tmp_path / name, tokenizer=place / "tok", **options, progress=False)
    replay, plain = Replay(tmp_path / "both"), Replay(tmp_path / "plain")
    assert replay.low_factors == (2, 4) and plain.low_factors == ()
    assert np.array_equal(replay.video, plain.video) and digest(replay) != digest(plain)
    pixels = torch.from_numpy(Replay(place / "data").video[40:80]).permute(0, 3, 1, 2)[None]
    numbers = np.arange(40, 80)
    for factor, run in low.items():
        (small,) = video_pyramid(pixels, (factor,), dtype=torch.float32)
        expected = load_tokenizer(run)[0].encode(small)[0]
        assert np.array_equal(replay.read_low(factor, numbers), expected) and expected.unique().numel() > 1
        assert np.array_equal(Replay(tmp_path / "both", memory_limit=0).read_low(factor, numbers), expected)
    clips = Clips(replay, 6).batch(np.array([0, 3]))
    assert torch.equal(
        clips["low_tokens_2"], torch.from_numpy(replay.read_low(2, np.arange(6)[None] + [[0], [3]])).long()
    )
    assert check(tmp_path / "both", 6) == []
    array = zarr.open_group(str(tmp_path / "both"))["data/tokens_2"]
    array[7, 0, 1] = 60
    problem = r"data/tokens_2 must be in 0\.\.59, got 60 in frame 7, token \[0, 1\]"
    assert any(re.search(problem, str(found)) for found in check(tmp_path / "both", 6))
    with pytest.raises(ValueError, match=problem):
        Replay(tmp_path / "both")
    shutil.rmtree(tmp_path / "both" / "data" / "tokens_4")
    with pytest.raises(ValueError, match="array data/tokens_4 is missing or unreadable"):
        Replay(tmp_path / "both")
    for low_tokenizers, message in (
        ((low[2], low[2]), "low_tokenizers must be of one factor >= 2 each, got 2"),
        ((place / "tok",), "low_tokenizers must be of one factor >= 2 each, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(place / "data", tmp_path / "x", tokenizer=place / "tok", low_tokenizers=low_tokenizers)
    with pytest.raises(ValueError, match=r"tokenizer must be of the frames themselves; .* is of frames smaller by 2"):
        encode(place / "data", tmp_path / "x", tokenizer=low[2])
    with pytest.raises(ValueError, match="low_tokenizers must go with a tokenizer"):
        encode(place / "data", tmp_path / "x", latent_actions=place / "lam", low_tokenizers=(low[2],))
    with pytest.raises(ValueError, match=r"factor must divide the frames of .*, 16 x 16, got 3"):
        for_pixels(replace(read(TokenizerTraining, low[2])[0], factor=3))


def test_a_world_model_learns_frames_that_were_tokenised_small(
    place: Path, low: dict[int, Path], tmp_path: Path
) -> None:
    encode(
        place / "data", tmp_path / "ids", tokenizer=place / "tok", low_tokenizers=tuple(low.values()), progress=False
    )
    replay = Replay(tmp_path / "ids")
    model = token_model(token_targets="tokenised")
    config = TrainingConfig(str(tmp_path / "ids"), 4, 4, clip=12, model=model, **{**TRAINER, "look_every": 4})
    config = replace(for_replay(config, replay), accumulate=2)
    whole = train(config, tmp_path / "whole", progress=False)
    train(config, tmp_path / "run", progress=False, stop_after=2)
    resumed = train(config, tmp_path / "run", progress=False)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "held_out" in read_log(tmp_path / "run" / "log.jsonl")[-1]
    clips = Clips(replay, 12).batch(np.array([0, 5, 50]))
    given = {"video": clips["video"], "actions": clips["actions"], "segment_ids": clips["segment_ids"]}
    loss = resumed.eval()(**given, low_tokens={2: clips["low_tokens_2"], 4: clips["low_tokens_4"]})
    bits = token_measures(resumed, clips, clips["actions"].roll(1, 0))["bits"]
    torch.testing.assert_close(torch.from_numpy(bits * np.log(2)).mean(0), loss.per_horizon, check_dtype=False)
    metrics = evaluate(tmp_path / "run", clips=4, batch=2, steps=3, progress=False)
    assert list(metrics["bits_per_token"]) == ["1", "2", "4"] and "rollout_psnr" in metrics and "drift" not in metrics
    assert write_report(tmp_path / "run").exists()
    encode(place / "data", tmp_path / "plain", tokenizer=place / "tok", progress=False)
    with pytest.raises(ValueError, match=r'"tokenised" needs the ids of smaller frames .* has those of \[\]: mfwm enc'):
        for_replay(replace(config, data=str(tmp_path / "plain")), Replay(tmp_path / "plain"))


def test_masked_models_are_rolled_out(place: Path, tmp_path: Path) -> None:
    """A masked model is rolled out: its most likely ids of tokens that it sees would say nothing."""
    encode(place / "data", tmp_path / "ids", tokenizer=place / "tok", progress=False)
    model = token_model()
    model = replace(model, masked=True, heads=replace(model.heads, horizons=Horizons((0, 1), (1, 2))))
    config = TrainingConfig(str(tmp_path / "ids"), 1, 4, clip=6, model=model, **TRAINER)
    train(config, tmp_path / "run", progress=False)
    metrics = evaluate(tmp_path / "run", clips=2, batch=2, steps=3, progress=False)
    assert len(metrics["rollout_psnr"]) == 3 and "bits_per_token" not in metrics
    assert "Closed-loop rollout" in write_report(tmp_path / "run").read_text()


def test_imported_tokens_have_figures_and_no_pictures(place: Path, tmp_path: Path) -> None:
    encode(place / "data", tmp_path / "ids", tokenizer=place / "tok", progress=False)
    attributes = tmp_path / "ids" / ".zattrs"
    attributes.write_text(attributes.read_text().replace('"tokenizer"', '"somebody"'))
    config = TrainingConfig(str(tmp_path / "ids"), 1, 4, clip=12, model=token_model(), **TRAINER)
    train(config, tmp_path / "run", progress=False)
    metrics = evaluate(tmp_path / "run", clips=4, batch=2, progress=False)
    assert metrics["accuracy"] and "rollout_psnr" not in metrics
    assert "bits per token" in write_report(tmp_path / "run").read_text()
    for name in ("pixels", "tokenizer"):
        with pytest.raises(
            ValueError, match=f"{name} is for sets that mfwm encode wrote, and .*/ids is not one; got x"
        ):
            evaluate(tmp_path / "run", **{name: "x"}, clips=4, batch=2, progress=False)
    with pytest.raises(ValueError, match=r"--against compares pictures, but .* was imported without a tokenizer"):
        evaluate(tmp_path / "run", against=tmp_path / "run", clips=4, batch=2, progress=False)


def test_tokens_know_their_pixels_and_tokenizer(place: Path, tmp_path: Path) -> None:
    """Frames of another set with the same episodes, and a tokenizer of the same sizes, show something else."""
    encode(place / "data", tmp_path / "ids", tokenizer=place / "tok", progress=False)
    replay = Replay(tmp_path / "ids")
    shutil.copytree(place / "data", tmp_path / "copy")
    shutil.copytree(place / "data", tmp_path / "other")
    zarr.open_group(str(tmp_path / "other"))["data/img"][0, 0, 0, 0] ^= 1
    short = replace(read(TokenizerTraining, place / "tok")[0], steps=1)
    train_tokenizer(short, tmp_path / "tok", progress=False)

    def decoder(replay: Replay, **places: Path) -> Decoder:
        return Decoder(replay, 6, np.arange(2), torch.device("cpu"), **places)

    decoder(replay, pixels=tmp_path / "copy")
    with pytest.raises(
        ValueError, match=r"pixels must be the set that .*/ids was encoded from; .*/other holds another one"
    ):
        decoder(replay, pixels=tmp_path / "other")
    with pytest.raises(ValueError, match=r"tokenizer must be the run that encoded .*/ids, .*; .*/tok has other wei"):
        decoder(replay, tokenizer=tmp_path / "tok")
    # A set of an earlier version says nothing of either, and is the same set.
    same = digest(replay)
    for name in (PIXELS_DIGEST, TOKENIZER_DIGEST):
        del replay.attributes[name]
    decoder(replay, pixels=tmp_path / "other", tokenizer=tmp_path / "tok")
    assert digest(replay) == same


def test_clips_of_both_sets_are_of_the_same_frames(place: Path) -> None:
    encode(place / "data", place / "same", tokenizer=place / "tok", progress=False)
    replay, episodes = Replay(place / "same"), np.array([3, 5])
    decoder = Decoder(replay, 6, episodes, torch.device("cpu"))
    indices = np.array([4, 40])
    clips = Clips(replay, 6, episodes=episodes, within_episode=True).batch(indices)
    # Encoded on their own they lack the frames before them: the last ids see all that they need.
    ids = decoder.tokenizer.encode(decoder.pixels(indices))
    assert torch.equal(ids[:, 3:], clips["video"][:, 3:])
    assert decoder.pictures(ids, 2).shape == (2, 4, 3, 16, 16)
