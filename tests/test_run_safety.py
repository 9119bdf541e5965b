"""Runs of strangers execute nothing; checkpoints/ may hold what is not ours; one process trains in a run at a time."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mfwm.evaluation.world_model import evaluate
from mfwm.export import export, load_exported
from mfwm.metrics.lpips import LPIPS
from mfwm.training import TrainingConfig, load_model, train
from mfwm.training.checkpoint_reading import MetadataUnpickler, read_metadata
from mfwm.training.checkpoints import Checkpoints, write_atomically, written_beside
from mfwm.training.run_lock import NAME, holder, locked
from mfwm.training.run_log import read_log
from safetensors.torch import save_file
from small_run import moving_squares, small_config
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("squares") / "data"
    moving_squares(path)
    return path


@pytest.fixture
def config(data: Path) -> TrainingConfig:
    return replace(small_config(data), steps=2, checkpoint_every=1)


@pytest.fixture
def run(config: TrainingConfig, tmp_path: Path) -> Path:
    train(config, tmp_path / "run", progress=False, stop_after=1)
    return tmp_path / "run"


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def metadata_of(run: Path) -> Path:
    return run / "checkpoints" / "00000001" / ".metadata"


def payload_alone(run: Path, payload: Payload) -> None:
    metadata_of(run).write_bytes(pickle.dumps(payload))


def payload_in_planner_data(run: Path, payload: Payload) -> None:
    """A payload inside otherwise sound metadata."""
    metadata = read_metadata(metadata_of(run))
    metadata.planner_data = {**metadata.planner_data, "x": payload}
    metadata_of(run).write_bytes(pickle.dumps(metadata))


def payload_by_eval(run: Path, payload: Payload) -> None:
    """A global of a builtin module, by the opcodes of protocol 0."""
    metadata_of(run).write_bytes(
        b"c__builtin__\neval\n(V__import__('pathlib').Path(%r).touch()\ntR." % str(payload.mark)
    )


def payload_by_a_dotted_name(run: Path, payload: Payload) -> None:
    """Protocol 4 lets a name lead on: from a known module to all that it imports."""
    call = pickle.dumps((f"touch {payload.mark}",), 4)[2:-1]
    metadata_of(run).write_bytes(b"\x80\x04" + named("os.system") + call + b"R.")


def named(name: str) -> bytes:
    """The opcodes of protocol 4 for a name in the module of the metadata's classes."""
    texts = (b"\x8c" + bytes([len(text)]) + text for text in (Metadata.__module__.encode(), name.encode()))
    return b"".join(texts) + b"\x93"


def payload_in_a_value(run: Path, payload: Payload) -> None:
    """A value that is no tensor, as long as the sound one of the optimiser that it takes the place of."""
    metadata = read_metadata(metadata_of(run))
    (info,) = (info for key, info in metadata.storage_data.items() if key.fqn == "optimiser.param_groups.0.lr")
    shard = run / "checkpoints" / "00000001" / "__0_0.distcp"
    value = io.BytesIO()
    torch.save(payload, value)
    info.offset, info.length = shard.stat().st_size, len(value.getvalue())
    shard.write_bytes(shard.read_bytes() + value.getvalue())
    metadata_of(run).write_bytes(pickle.dumps(metadata))


def payload_in_a_tensor(run: Path, payload: Payload) -> None:
    """Where the weights of the model are."""
    metadata = read_metadata(metadata_of(run))
    (info,) = (info for key, info in metadata.storage_data.items() if key.fqn == "model.model.token_position")
    shard = run / "checkpoints" / "00000001" / "__0_0.distcp"
    value = io.BytesIO()
    torch.save({"place": payload}, value)
    info.offset, info.length = shard.stat().st_size, len(value.getvalue())
    shard.write_bytes(shard.read_bytes() + value.getvalue())
    metadata_of(run).write_bytes(pickle.dumps(metadata))


PAYLOADS = [
    payload_alone,
    payload_in_planner_data,
    payload_by_eval,
    payload_by_a_dotted_name,
    payload_in_a_value,
    payload_in_a_tensor,
]


@pytest.mark.parametrize("plant", PAYLOADS, ids=lambda plant: plant.__name__)
def test_a_strangers_checkpoint_runs_nothing(
    run: Path, config: TrainingConfig, tmp_path: Path, plant: Callable[[Path, Payload], None]
) -> None:
    mark = tmp_path / "executed"
    plant(run, Payload(mark))
    readers: list[Callable[[], object]] = [
        lambda: evaluate(run, clips=2, progress=False),
        lambda: export(run, tmp_path / "out.safetensors"),
        lambda: train(config, run, progress=False),
    ]
    for read in readers:
        # Evaluation and export read none of the optimiser's values.
        if plant is payload_in_a_value and read is not readers[-1]:
            read()
        else:
            with pytest.raises(
                ValueError,
                match=r"00000001 cannot be read .*(which is not part|not a plain value|WeightsUn|Weights only)",
            ):
                read()
        assert not mark.exists()


def test_the_class_that_is_refused_is_named(run: Path, tmp_path: Path) -> None:
    payload_alone(run, Payload(tmp_path / "executed"))
    with pytest.raises(ValueError, match=r"\.metadata is not .*: it names pathlib\.Path\.touch|names pathlib.*touch"):
        load_model(run)
    metadata_of(run).write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"\.metadata is not the metadata of a checkpoint"):
        load_model(run)
    metadata_of(run).write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    with pytest.raises(ValueError, match=r"must hold the metadata of a checkpoint, got dict"):
        load_model(run)


def test_metadata_changes_no_class() -> None:
    """BUILD sets attributes of what is on the stack: of a class, it would set them for the whole process."""
    state = pickle.dumps((None, {"version": "planted"}), 4)[2:-1]
    with pytest.raises(pickle.UnpicklingError, match="it sets attributes of <class"):
        MetadataUnpickler(io.BytesIO(b"\x80\x04" + named("Metadata") + state + b"b.")).load()
    assert Metadata.version is None


@pytest.mark.parametrize("place", ["../../config.json", "/etc/hostname", "", "..", "a\\b"])
def test_files_outside_a_checkpoint_are_refused(run: Path, place: str) -> None:
    metadata = read_metadata(metadata_of(run))
    for info in metadata.storage_data.values():
        info.relative_path = place
    metadata_of(run).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"files of a checkpoint must be in its own directory, got"):
        load_model(run)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_links_in_a_checkpoint_are_refused(run: Path, tmp_path: Path, name: str) -> None:
    file = metadata_of(run).with_name(name)
    os.replace(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name} is a link: a checkpoint holds plain files only"):
        load_model(run)


def test_a_tensor_is_replaced_by_no_value(run: Path) -> None:
    """Metadata that calls a weight a value would leave the weight as it was made."""
    metadata = read_metadata(metadata_of(run))
    values = {key.fqn: (key, info) for key, info in metadata.storage_data.items()}
    lr = "optimiser.param_groups.0.lr"
    metadata.state_dict_metadata["model.model.token_position"] = metadata.state_dict_metadata[lr]
    tensor, _ = values["model.model.token_position"]
    del metadata.storage_data[tensor]
    metadata.storage_data[replace(values[lr][0], fqn="model.model.token_position")] = values[lr][1]
    metadata_of(run).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"model\.model\.token_position must be Tensor, got float"):
        load_model(run)


def test_metadata_of_our_own_is_all_known(run: Path) -> None:
    metadata = read_metadata(metadata_of(run))
    assert isinstance(metadata.storage_meta, StorageMeta) and len(metadata.storage_data) > 50


def test_weights_of_lpips_run_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    torch.save({"lin0.model.1.weight": Payload(mark)}, tmp_path / "lpips.pt")
    with pytest.raises(ValueError, match=r"lpips.pt must be a file of tensors by torch.save: Weights only"):
        LPIPS(tmp_path / "lpips.pt")
    assert not mark.exists()
    (tmp_path / "lpips.pt").write_bytes(b"not one")
    with pytest.raises(ValueError, match=r"lpips.pt must be a file of tensors"):
        LPIPS(tmp_path / "lpips.pt")


def test_an_exported_file_of_another_kind_is_refused(tmp_path: Path, config: TrainingConfig) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"x.safetensors is not a safetensors file"):
        load_exported(path)
    for header, message in (
        ({"config": "[]"}, "x.safetensors, config must hold a JSON object, got list"),
        ({"config": '{"data": "x", "steps": "many"}'}, "steps must be int, got 'many'"),
        ({"config": '{"data": "x"}', "step": "last"}, "step must be a number, got 'last'"),
        ({"config": '{"data": "x"}', "step": "3"}, "does not hold the weights of its config"),
    ):
        save_file({"a": torch.zeros(1)}, str(path), header)
        with pytest.raises(ValueError, match=message):
            load_exported(path)


# ---- what else is in checkpoints/

STATE = {"x": torch.ones(2)}


@pytest.mark.parametrize(
    "name", [".DS_Store", ".nfs000000001", "._00000001", ".gitkeep", "12", "notes.txt", ".00000007.tmp", "²"]
)
def test_files_beside_checkpoints_stay(tmp_path: Path, name: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(STATE, 1)
    (tmp_path / name).write_bytes(b"x")
    assert checkpoints.steps() == [1]
    checkpoints.save(STATE, 2)
    assert checkpoints.steps() == [2] and sorted(os.listdir(tmp_path)) == sorted(["00000002", name])


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".snapshot", "12", "20240101", ".20240101", "00000009.bak"])
def test_directories_beside_checkpoints_stay(tmp_path: Path, name: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(STATE, 1)
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes").write_text("mine")
    checkpoints.save(STATE, 2)
    assert checkpoints.steps() == [2] and (tmp_path / name / "notes").read_text() == "mine"


@pytest.mark.parametrize("name", [".latest", "latest", "00000009", ".00000009"])
def test_links_beside_checkpoints_stay(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoints"
    other = Checkpoints(tmp_path / "other")
    other.save(STATE, 9)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(STATE, 1)
    (folder / name).symlink_to(other.path(9))
    assert checkpoints.latest() == 1
    checkpoints.save(STATE, 2)
    assert checkpoints.steps() == [2] and (folder / name).is_symlink() and other.steps() == [9]


def test_what_a_killed_save_left_is_deleted(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for name in (".00000001", ".00000003.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".00000002").mkdir()
    checkpoints.save(STATE, 4)
    assert os.listdir(tmp_path) == ["00000004"]


def test_a_users_file_in_an_old_checkpoint_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(STATE, 1)
    (checkpoints.path(1) / "notes").write_text("mine")
    with pytest.warns(UserWarning, match=r"00000001 holds files that are not part of a checkpoint \(notes\): kept"):
        checkpoints.save(STATE, 2)
    checkpoints.save(STATE, 3)
    assert checkpoints.steps() == [3] and sorted(os.listdir(tmp_path)) == ["00000001", "00000003"]
    assert os.listdir(checkpoints.path(1)) == ["notes"]


def test_a_checkpoint_without_metadata_is_damaged_and_not_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(STATE, step)
    (checkpoints.path(2) / ".metadata").unlink()
    assert checkpoints.latest() == 2
    with pytest.raises(ValueError, match=r"\.metadata is missing\); delete it to resume from step 1"):
        checkpoints.load({"x": torch.zeros(2)}, 2)


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_what_has_the_name_of_a_checkpoint_to_come_is_told_before_training(
    config: TrainingConfig, tmp_path: Path, kind: str
) -> None:
    place = tmp_path / "run" / "checkpoints" / "00000002"
    place.parent.mkdir(parents=True)
    if kind == "directory":
        place.mkdir()
        (place / "notes").write_text("mine")
    elif kind == "link":
        place.symlink_to(tmp_path)
    else:
        place.write_text("mine")
    with pytest.raises(FileExistsError, match="00000002 is not a checkpoint but has the name of one: move it away"):
        train(config, tmp_path / "run", progress=False)
    assert os.path.lexists(place) and not (tmp_path / "run" / "log.jsonl").exists()


# ---- files of others in the place of a run's


FOREIGN = {
    "other keys": (
        "config.json",
        b'{"hidden_size": 768}',
        "out holds config.json, which no run wrote: choose another out",
    ),
    "no JSON": ("config.json", b"width: 3", r"out holds config.json, which no run wrote \(.*must hold JSON"),
    "a list": ("config.json", b"[]", r"out holds config.json, which no run wrote \(.*must hold a JSON object"),
    "a log": ("log.jsonl", b'{"step": 0, "mine": 1}\n', "out holds log.jsonl but no config.json, so no run wrote it"),
    "a lock": (".lock", b"#1234# yarn.lock", "out holds .lock, which no run wrote: choose another out"),
    "a lock in JSON": (".lock", b'{"packages": []}', "out holds .lock, which no run wrote: choose another out"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_that_are_no_runs_are_refused_and_stay(config: TrainingConfig, tmp_path: Path, kind: str) -> None:
    name, content, message = FOREIGN[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path, progress=False)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == content


def test_files_beside_those_of_a_run_stay(config: TrainingConfig, tmp_path: Path) -> None:
    """Also where an interrupted first start had left its lock, named or empty, and no config yet."""
    names = ("config.json.tmp", "log.jsonl.tmp", "notes.txt")
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / NAME).write_text('{"pid": 1, "host": "gone", "since": "2026-01-01T00:00:00+00:00"}')
    train(config, tmp_path, progress=False, stop_after=1)
    assert [(tmp_path / name).read_text() for name in names] == ["mine"] * 3
    ours = {"config.json", "log.jsonl", "checkpoints", NAME}
    assert set(os.listdir(tmp_path)) == {*names, *ours}


def test_a_first_start_that_was_interrupted_starts_again(config: TrainingConfig, tmp_path: Path) -> None:
    for files in ([NAME], [NAME, "config.json"], [NAME, "config.json", "log.jsonl"]):
        run = tmp_path / str(len(files))
        train(config, run, progress=False, stop_after=1)
        shutil.rmtree(run / "checkpoints")
        for name in {"config.json", "log.jsonl"} - set(files):
            (run / name).unlink()
        train(config, run, progress=False)
        assert [row["step"] for row in read_log(run / "log.jsonl")] == [0, 1]


def test_checkpoints_without_a_config_are_refused(config: TrainingConfig, run: Path) -> None:
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match=r"out holds checkpoints but no config.json, .* or choose another out"):
        train(replace(config, lr=0.5), run, progress=False)
    assert not (run / "config.json").exists() and Checkpoints(run / "checkpoints").steps() == [1]


@pytest.mark.parametrize("place", [".", "run", ".."])
def test_a_run_is_not_written_into_its_data(config: TrainingConfig, tmp_path: Path, place: str) -> None:
    data = tmp_path / "sets" / "data"
    shutil.copytree(config.data, data)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="out must be another place than data"):
        train(replace(config, data=str(data)), data / place, progress=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(KeyboardInterrupt), written_beside(path) as unfinished:
        unfinished.write_bytes(b"ne")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]

    def cut_short(self: Path, content: bytes) -> int:
        with open(self, "wb") as file:
            file.write(content[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", cut_short)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_an_exported_file_takes_no_other_files_place(run: Path, tmp_path: Path) -> None:
    out, users = tmp_path / "out.safetensors", tmp_path / "out.safetensors.tmp"
    users.write_text("mine")
    before = os.umask(0o027)
    try:
        export(run, out)
    finally:
        os.umask(before)
    assert users.read_text() == "mine" and stat.S_IMODE(out.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "out.safetensors.tmp", "run"]
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError, match=r"link.safetensors exists: choose another file"):
        export(run, link)
    assert link.is_symlink()


def test_an_export_that_the_disk_refuses_is_one_line(run: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    before = sorted(tmp_path.rglob("*"))
    command = ["sh", "-c", 'ulimit -f 8 && exec "$@"', "sh", sys.executable, "-m", "mfwm.cli", "export", run]
    told = subprocess.run([*command, "--out", tmp_path / "out.safetensors"], stderr=subprocess.PIPE, text=True)
    assert told.returncode == 2, told.stderr
    assert told.stderr.startswith(f"mfwm: {tmp_path}/out.safetensors could not be written: ")
    assert told.stderr.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before


# ---- one process at a time


def test_a_second_process_is_told_who_trains(config: TrainingConfig, run: Path) -> None:
    before = (run / "log.jsonl").read_bytes(), (run / "config.json").read_bytes()
    with locked(run):
        message = rf"run is in use: process {os.getpid()} on .*, since 20\d\d-.*, trains in it"
        with pytest.raises(BlockingIOError, match=message):
            train(config, run, progress=False)
        assert ((run / "log.jsonl").read_bytes(), (run / "config.json").read_bytes()) == before
        # Reading is for all.
        assert evaluate(run, clips=2, progress=False)["steps"] == 1
        export(run, run.parent / "out.safetensors")
    train(config, run, progress=False)
    assert [row["step"] for row in read_log(run / "log.jsonl")] == [0, 1]


def test_the_lock_of_a_dead_process_is_no_obstacle(config: TrainingConfig, run: Path) -> None:
    code = (
        "import time; from pathlib import Path; from mfwm.training.run_lock import locked\n"
        f"with locked(Path({str(run)!r})): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"process {process.pid} on "):
            train(config, run, progress=False)
        os.kill(process.pid, signal.SIGKILL)
    # What it wrote is still there.
    assert json.loads((run / NAME).read_text())["pid"] == process.pid
    train(config, run, progress=False)
    assert (run / NAME).read_text() == ""


def test_a_lock_that_is_not_written_yet_names_no_process() -> None:
    assert holder(b"") == holder(b"[]") == holder(b'{"pid": 3}') == "another process"


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with (
        pytest.warns(UserWarning, match=r"cannot be locked on this file system \(No locks available\)"),
        locked(tmp_path),
    ):
        pass


def test_a_run_is_evaluated_while_it_trains(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest checkpoint may be dropped for newer ones while it is read."""
    load = Checkpoints.load
    begun: list[int] = []

    def overtaken(self: Checkpoints, state: dict[str, Any], step: int) -> None:
        begun.append(step)
        if len(begun) == 1:
            os.replace(self.path(step), self.path(step + 1))
        load(self, state, step)

    monkeypatch.setattr(Checkpoints, "load", overtaken)
    assert load_model(run)[2] == 2 and begun == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_resume(config: TrainingConfig, tmp_path: Path, number: signal.Signals) -> None:
    folder = str(Path(__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {folder!r})\n"
        "from dataclasses import replace; from pathlib import Path\n"
        "from mfwm.training import train; from small_run import small_config\n"
        f"config = replace(small_config(Path({config.data!r})), steps=5000, checkpoint_every=5000)\n"
        f"train(config, Path({str(tmp_path / 'run')!r}))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        log = tmp_path / "run" / "log.jsonl"
        while not (log.exists() and log.stat().st_size) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    step = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert process.returncode == 128 + number and step == len(read_log(log))
    assert told.strip() == (
        f"stopped at step {step} of 5000, which is saved in {tmp_path / 'run'}: run the same command again to resume"
    )
