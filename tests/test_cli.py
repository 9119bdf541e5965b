"""The command line: mistakes in one line, Ctrl-C, and progress that can be read in a file."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mfwm import cli, progress
from mfwm.data import Replay
from mfwm.demo import complete
from mfwm.extras import installation
from mfwm.progress import Progress, clock
from mfwm.training import train
from small_run import moving_squares, small_config


def mfwm(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mfwm.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `mfwm` with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["mfwm", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    told = mfwm("evaluate", tmp_path / "nothing")
    assert told.returncode == 2 and told.stdout == ""
    assert told.stderr == f"mfwm: {tmp_path}/nothing is not a run directory: it has no config.json\n"
    shown = mfwm("evaluate", tmp_path / "nothing", MFWM_TRACEBACK="1")
    assert shown.returncode == 1 and shown.stderr.startswith("Traceback")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere", "--out", "run"], "nowhere does not exist: expected a Zarr replay buffer"),
        (["evaluate", "run", "--clips", "0"], "mfwm: clips must be >= 1, got 0"),
        (["train", "--data", "x", "--out", "run", "--ema", "2"], "ema must be in [0, 1), got 2.0"),
        (["export", "nothing", "--out", "x.safetensors"], "mfwm: nothing is not a run directory"),
        (["collect", "chess", "--frames", "10", "--out", "set"], "mfwm: env must be"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(monkeypatch, *arguments) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert not list(tmp_path.iterdir())


def failing(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def mfwm_without(packages: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    """`mfwm` where these packages are not installed."""
    code = f"import sys; sys.modules.update(dict.fromkeys({packages})); from mfwm.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("package", "arguments", "advice"),
    [
        ("tyro", ["train", "--help"], "pip install 'mfwm-kernels[train]'"),
        ("zarr", ["collect", "balls"], "pip install 'mfwm-kernels[data]' or pip install 'mfwm-kernels[train]'"),
        ("matplotlib", ["evaluate", "nothing"], ": pip install 'mfwm-kernels[train]'"),
    ],
)
def test_a_missing_package_names_the_extra_that_has_it(package: str, arguments: list[str], advice: str) -> None:
    """As after `pip install mfwm-kernels` alone."""
    told = mfwm_without((package,), *arguments)
    assert told.returncode == 2 and told.stderr.count("\n") == 1
    assert told.stderr.startswith("mfwm: ") and package in told.stderr and told.stderr.endswith(advice + "\n")


def test_the_extra_data_is_all_that_collecting_and_checking_need(tmp_path: Path) -> None:
    others = (
        "aiohttp",
        "imageio",
        "matplotlib",
        "safetensors",
        "tensorboard",
        "torchmetrics",
        "vector_quantize_pytorch",
    )
    collected = mfwm_without(others, "collect", "balls", "--frames", 40, "--out", tmp_path / "balls")
    assert collected.returncode == 0, collected.stderr
    checked = mfwm_without(others, "data", "check", tmp_path / "balls")
    assert checked.stdout.endswith("balls: ok\n"), checked.stdout + checked.stderr


def test_a_missing_package_that_no_extra_has_is_just_named() -> None:
    assert installation("no_such_package.part") == ""


@pytest.mark.parametrize(
    "error", [KeyError("x"), AssertionError("x"), IndexError("x"), RuntimeError("x"), TypeError("x")]
)
def test_faults_of_the_program_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr("mfwm.describe.rows", failing(error))
    monkeypatch.setattr(sys, "argv", ["mfwm", "describe", "1m"])
    with pytest.raises(type(error)):
        cli.main()


def test_a_type_error_of_a_check_is_a_mistake_and_one_of_a_sum_is_not() -> None:
    with pytest.raises(TypeError) as checked:
        replace(small_config(Path("x")), steps=2.5)
    with pytest.raises(TypeError) as summed:
        clock("x")  # type: ignore[arg-type]
    assert cli.expected(checked.value) and not cli.expected(summed.value)


@pytest.mark.parametrize("how", ["--traceback", "MFWM_TRACEBACK"])
def test_the_traceback_of_a_mistake_is_had_on_request(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    arguments = ["evaluate", "nothing"]
    if how == "--traceback":
        arguments.insert(0, how)
    else:
        monkeypatch.setenv(how, "1")
    monkeypatch.setattr(sys, "argv", ["mfwm", *arguments])
    with pytest.raises(ValueError, match="nothing is not a run directory"):
        cli.main()


@pytest.mark.parametrize("value", ["", "0", "false", "No", "OFF"])
def test_no_traceback_is_said_in_any_of_these_words(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MFWM_TRACEBACK", value)
    assert main(monkeypatch, "evaluate", "nothing") == 2


@pytest.mark.parametrize("option", ["--steps", "--tokenizer-steps"])
def test_the_demo_has_no_zero_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(monkeypatch, "demo", option, "0") == 2
    name = option.removeprefix("--").replace("-", "_")
    assert capsys.readouterr().err == f"mfwm: {name} must be >= 1, got 0\n" and not list(tmp_path.iterdir())


def test_the_demo_looks_past_litter_and_puts_a_set_back(tmp_path: Path) -> None:
    data, made = tmp_path / "data", []

    def make() -> None:
        made.append(True)
        moving_squares(data)

    data.mkdir()
    (data / ".DS_Store").write_text("litter")
    complete(data, make)
    assert made and Replay(data).frames == 480
    # A writer that was killed between its two renames left it beside.
    (tmp_path / ".data.writing").mkdir()
    (tmp_path / ".data.writing" / "lock").touch()
    os.rename(data, tmp_path / ".data.writing" / "old")
    complete(data, make)
    assert len(made) == 1 and Replay(data).frames == 480


def test_an_interrupt_is_one_line_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mfwm.describe.rows", failing(KeyboardInterrupt()))
    assert main(monkeypatch, "describe", "1m") == 130
    assert capsys.readouterr().err == "mfwm: interrupted\n"


def test_ctrl_c_while_modules_are_loaded() -> None:
    """Torch is the first that takes long."""
    code = (
        "import sys, signal, os\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "from mfwm.cli import main\n"
        "sys.argv = ['mfwm', 'describe', '1m']\n"
        "main()"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (told.returncode, told.stdout, told.stderr) == (130, "", "mfwm: interrupted\n")


def test_ctrl_c_while_zarr_starts() -> None:
    """Zarr's exit handler then joins a thread that was never started, which Python reports at exit."""
    code = (
        "import asyncio, sys, threading\n"
        "from zarr.core import sync\n"
        "sync.loop[0], sync.iothread[0] = asyncio.new_event_loop(), threading.Thread()\n"
        "import mfwm.cli, mfwm.commands\n"
        "def interrupted(*_): raise KeyboardInterrupt\n"
        "mfwm.commands.command_of = interrupted\n"
        "mfwm.cli.main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "mfwm: interrupted\n")


def test_ctrl_c_while_collecting(tmp_path: Path) -> None:
    """SIGINT to the whole group, as a terminal sends it: the recorder of the game has it too."""
    pytest.importorskip("ale_py")
    command = [
        sys.executable,
        "-m",
        "mfwm.cli",
        "collect",
        "atari:Pong",
        "--frames",
        "1000000",
        "--out",
        tmp_path / "set",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not list(tmp_path.rglob("*")) and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and told == "mfwm: interrupted\n"


def test_ctrl_c_while_training(tmp_path: Path) -> None:
    moving_squares(tmp_path / "data")
    run = tmp_path / "run"
    small = "--model.patch 8 --model.width 32 --model.layers 1 --model.context 8 --clip 12 --batch 2 --look-every 0"
    command = [sys.executable, "-m", "mfwm.cli", "train", "--data", tmp_path / "data", "--out", run, *small.split()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        while not ((run / "log.jsonl").exists() and (run / "log.jsonl").stat().st_size) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(told.splitlines()) == 1 and told.endswith(f"is saved in {run}: run the same command again to resume\n")


def test_the_place_of_a_moved_set_is_an_option(tmp_path: Path) -> None:
    moving_squares(tmp_path / "data")
    train(replace(small_config(tmp_path / "data"), steps=1), tmp_path / "run", progress=False)
    (tmp_path / "far").mkdir()
    os.rename(tmp_path / "data", tmp_path / "far" / "away")
    told = mfwm("evaluate", tmp_path / "run", "--clips", 2)
    assert told.returncode == 2 and "give its new place as data" in told.stderr
    done = mfwm("evaluate", tmp_path / "run", "--clips", 2, "--data", tmp_path / "far" / "away")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[: done.stdout.rindex("}") + 1])["clips"] == 2
    assert done.stderr.startswith("evaluate: 2 of 2 clips, 0:0") and done.stderr.count("\n") == 1


# ---- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_file_is_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, file = [100.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", file)
    with Progress("train", 100, "step", done=40) as bar:
        for step in range(30):
            now[0] += 0.75
            bar.update(loss=f"{step}")
    assert file.getvalue().splitlines() == [
        "train: 54 of 100 steps, loss 13, 0:10, 0:34 left",
        "train: 68 of 100 steps, loss 27, 0:21, 0:24 left",
        "train: 70 of 100 steps, loss 29, 0:22, 0:22 left",
    ]


def test_progress_at_the_end_and_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    assert list(Progress("import", 2, "episode").over([3, 4])) == [3, 4]
    assert list(Progress("evaluate", 5, "clip").over(["abc", "de"], len)) == ["abc", "de"]
    told = "import: 2 of 2 episodes, 0:00\nevaluate: 5 of 5 clips, 0:00\n"
    assert file.getvalue() == told
    with pytest.raises(ValueError, match="x"), Progress("train", 3, "step") as bar:
        bar.update()
        raise ValueError("x")
    assert list(Progress("import", 2, "episode", shown=False).over([3, 4])) == [3, 4]
    assert file.getvalue() == told


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("train", 2, "step") as bar:
        bar.update(2, loss="0.5")
        bar.say("hello")
    assert "100%" in terminal.getvalue() and "\r" in terminal.getvalue() and "hello\n" in terminal.getvalue()


class Broken(Terminal):
    """A terminal, or a pipe, that nobody reads any more after so many writes."""

    def __init__(self, left: int, *, terminal: bool) -> None:
        super().__init__()
        self.left, self.terminal = left, terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


class Written:
    """All that a notebook's or a service's own standard error need have."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...


def closed() -> io.StringIO:
    file = io.StringIO()
    file.close()
    return file


NO_READER: dict[str, Any] = {
    "none": lambda: None,
    "closed": closed,
    "without isatty": Written,
    "a broken pipe": lambda: Broken(0, terminal=False),
    "broken in the middle": lambda: Broken(2, terminal=False),
    "a broken terminal": lambda: Broken(0, terminal=True),
    "a terminal that breaks": lambda: Broken(3, terminal=True),
}


@pytest.mark.parametrize("kind", NO_READER)
def test_the_work_goes_on_where_nobody_reads_its_progress(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(sys, "stderr", NO_READER[kind]())
    with Progress("train", 20, "step") as bar:
        for step in range(20):
            bar.update(loss=f"{step}")
            bar.say("hello")
    assert bar.done == 20
    assert list(Progress("import", 2, "episode").over([3, 4])) == [3, 4]


def test_standard_error_may_be_closed() -> None:
    code = (
        "import sys; assert sys.stderr is None\n"
        "from mfwm.progress import Progress\n"
        "print(list(Progress('import', 2, 'episode').over([3, 4])))"
    )
    told = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    assert (told.returncode, told.stdout) == (0, "[3, 4]\n")


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0.4, 59.6, 61, 3600, 36_061)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:00:00",
        "10:01:01",
    ]


# ---- shared machines


@pytest.mark.parametrize(("chosen", "then"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_do_not_spin(chosen: str | None, then: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if chosen is not None:
        environment["OMP_WAIT_POLICY"] = chosen
    code = (
        "import sys, os, importlib.util\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': print(os.environ.get('OMP_WAIT_POLICY'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        "from mfwm import WorldModel"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert told.stdout.split() == [then]
