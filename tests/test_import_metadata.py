"""Tables and metadata of imports: read as people and programs write them, or refused with file, rule and value."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mfwm.data import Replay
from mfwm.data.actions_table import read_actions
from mfwm.data.import_lerobot import import_lerobot
from mfwm.data.import_tokens import import_tokens
from mfwm.data.import_videos import import_videos
from PIL import Image
from small_set import beside
from test_imports import write_mp4
from test_pictures import encoded

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

# ---- actions.csv

ROWS = [("a.mp4", 0, 0), ("a.mp4", 1, 2), ("b.mp4", 0, 1), ("b.mp4", 1, 3)]


def table(between: str = ",", end: str = "\n", header: str = "video,frame,action", cell: str = "{}") -> str:
    lines = [header.replace(",", between)]
    lines += [between.join(cell.format(value) for value in row) for row in ROWS]
    return end.join(lines) + end


DIALECTS: dict[str, bytes] = {
    "plain": table().encode(),
    "a byte order mark": table().encode("utf-8-sig"),
    "UTF-16": table().encode("utf-16"),
    "UTF-16, big-endian, with tabs": b"\xfe\xff" + table("\t").encode("utf-16-be"),
    "semicolons": table(";").encode(),
    "semicolons with a mark and CRLF": table(";", "\r\n").encode("utf-8-sig"),
    "a line that says what separates": ("sep=;\r\n" + table(";", "\r\n")).encode(),
    "tabs": table("\t").encode(),
    "CRLF": table(end="\r\n").encode(),
    "CR": table(end="\r").encode(),
    "no line end": table().rstrip().encode(),
    "spaces": table(", ", header="video , frame,action ").encode(),
    "quotes": table(cell='"{}"', header='"video","frame","action"').encode(),
    "quotes after spaces": table(", ", cell='"{}"').encode(),
    "capitals": table(header="Video,Frame,ACTION").encode(),
    "empty lines": table(end="\n\n").encode(),
    "lines of commas": (table() + ",,\n").encode(),
    "commas at the end": table(end=",\n", header="video,frame,action").encode(),
    "a comma at the end of the header": table().replace("action\n", "action,\n").encode(),
    "a quoted semicolon and tab": table(header='video,frame,action,"a;\tb"', end=",\n").encode(),
    "a quoted semicolon over two lines": b'"a;\nb",video,frame,action\n' + b"".join(
        f'"x;\t""y"" ,z",{v},{t},{a}\n'.encode() for v, t, a in ROWS
    ),
    "a comma among semicolons": table(";", header='video,frame,action,"x,y"', end=";\n").replace("x;y", "x,y").encode(),
    "spaces after quotes": table(" , ", cell='"{}"', end=" \r\n").encode(),
    "semicolons and spaces after quotes": table(
        " ; ", cell='"{}"', header='"video" ,"frame" ,"action"', end=" \n"
    ).encode(),
    "decimal commas": b"video;frame;action\na.mp4;0,0;0,0\na.mp4;1,0;2,0\nb.mp4;0;1\nb.mp4;1;3,00\n",
    "whole floats": b"video,frame,action\na.mp4,0.0,0.0\na.mp4,1.0,2.0\nb.mp4,0.0,1\nb.mp4,1,3e0\n",
    "an index of pandas": b",video,frame,action\n0,a.mp4,0,0\n1,a.mp4,1,2\n2,b.mp4,0,1\n3,b.mp4,1,3\n",
    "another order": b"action,note,frame,video\n0,x,0,a.mp4\n2,,1,a.mp4\n1,\"y, z\",0,b.mp4\n3,,1,b.mp4\n",
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_tables_of_every_dialect(tmp_path: Path, dialect: str) -> None:
    (tmp_path / "actions.csv").write_bytes(DIALECTS[dialect])
    found = read_actions(tmp_path / "actions.csv")
    assert list(found) == ["a.mp4", "b.mp4"] and found["a.mp4"].dtype == np.int64
    assert [values.tolist() for values in found.values()] == [[0, 2], [1, 3]]


# As text is sorted.
SORTED = (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("video,frame,action_0,action_1\na,0,0.5,-1e-3\n", [[0.5, -0.001]]),
        ("video;frame;action_0;action_1\na;0;0,5;-1,25\na;1;3;.5\n", [[0.5, -1.25], [3, 0.5]]),
        ("video\tframe\taction_0\na\t0\t-0,5\n", [[-0.5]]),
        ("action_1,action_0,frame,video\n2,1,0,a\n", [[1, 2]]),
        (
            f"video,frame,{','.join(f'action_{n}' for n in SORTED)}\na,0,{','.join(map(str, SORTED))}\n",
            [list(range(12))],
        ),
        ("video,frame,action_left,action_gas\na,0,3,4\n", [[3, 4]]),
    ],
)  # fmt: skip
def test_tables_of_continuous_actions(tmp_path: Path, text: str, rows: list[list[float]]) -> None:
    (tmp_path / "actions.csv").write_text(text)
    found = read_actions(tmp_path / "actions.csv")["a"]
    assert found.dtype == np.float32 and np.allclose(found, rows)


HEAD = "video,frame,action\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "\n\n\na,0,1\na,1,x\n", r"line 6: an action must be a number, got 'x'"),
        (HEAD.replace("\n", ",\n") + "a,0\n", r"line 2 must have 4 cells, as the first line has, got 2"),
        (HEAD + '"a" x,0,0\n', r"cannot be read as a table"),
        (HEAD + '"a" ,0,1\n"a" ,1,x\n', r"line 3: an action must be a number, got 'x'"),
        (HEAD + 'a,0,1\n"a\nb",0,1\na,1,x\n', r"line 5: an action must be a number, got 'x'"),
        (HEAD + "a,0,0.5\n", r"line 2: an action must be an integer, got '0.5'"),
        (HEAD + "a,0,-1\n", r"line 2: an action must be an integer >= 0 .*, got '-1'"),
        (HEAD + "a,0,\n", r"line 2: an action must be a number, got ''"),
        (HEAD + "a,0,nan\n", r"line 2: an action must be finite, got 'nan'"),
        (HEAD + f"a,0,{10**30}\n", r"line 2: an action must be an integer .* fits into 64 bits, got '10+'"),
        (HEAD + f"a,0,{'9' * 5000}\n", r"line 2: an action must be finite"),
        (HEAD + f"a,0,{'0' * 5000}1.5\n", r"line 2: an action must be an integer"),
        (HEAD + f"a,{'0' * 5000}1,0\n", r"frame 0 of a has no action"),
        (HEAD + f"a,0,{2**63 - 1}\n", r"line 2: an action must be an integer .* fits into 64 bits"),
        (f"video,frame,action_{'9' * 5000}\na,0,1\n", r"action_0, action_1, ... without a gap"),
        ("video,frame,action_0,action_00\na,0,1,2\n", r"action_0, action_1, ... without a gap"),
        (HEAD + "a,0,1_0\n", r"line 2: an action must be a number, got '1_0'"),
        (HEAD + "a,-1,0\n", r"line 2: frame must be an integer >= 0"),
        (HEAD + "a,0.5,0\n", r"line 2: frame must be an integer, got '0.5'"),
        (HEAD + "a,x,0\n", r"line 2: frame must be a number, got 'x'"),
        (HEAD + ",0,1\n", r"line 2: video is empty"),
        *(
            (HEAD + f"a,0,1\n{name},0,1\n", rf"line 3: video must be a file in the folder .*, got '{name}'")
            for name in ("/etc/x.mp4", "../x.mp4", "a/../../x.mp4", "..")
        ),
        (HEAD + "a,0\n", r"line 2 must have 3 cells, as the first line has, got 2"),
        (HEAD + "a,0,0,12\n", r"line 2 must have 3 cells, as the first line has, got 4"),
        (HEAD + "a,1,0\n", r"frame 0 of a has no action"),
        (HEAD + "a,0,0\na,999999999999,0\n", r"frame 1 of a has no action"),
        (HEAD + "a,0,0\na,0.0,1\n", r"line 3: frame 0 of a appears twice"),
        (HEAD + '"a"x,0,0\n', r"cannot be read as a table"),
        (HEAD + '"a,0,0\n', r"cannot be read as a table"),
        ("video,frame,action_0\na,0,nan\n", r"line 2: an action must be finite as float32, got 'nan'"),
        ("video,frame,action_0\na,0,1e300\n", r"line 2: an action must be finite as float32, got '1e300'"),
        ("video,frame,action_0\na,0,-1e39\n", r"line 2: an action must be finite as float32, got '-1e39'"),
        ("video,frame,action_0\na,0,\"0,5\"\n", r"line 2: an action must be a number, got '0,5'"),
        ("video;frame;action_0\na;0;1.234,5\n", r"line 2: an action must be a number, got '1.234.5'"),
        ("video,frame,action_0,action_2\na,0,1,2\n", r"action_0, action_1, ... without a gap"),
        ("video,frame,action,action_0\na,0,1,2\n", r"must have columns video, frame and action"),
        ("video,frame,action_0,action_0\na,0,1,2\n", r"must have columns .* each once"),
        ("video,frame,action,Video\na,0,1,2\n", r"must have columns .* each once"),
        ("video,frame\na,0\n", r"must have columns video, frame and action"),
        (HEAD, r"has no rows"), ("", r"must have columns"), ("sep=;\n", r"must have columns"),
        ('sep="\n' + HEAD, r"must have columns"), ("sep= \n" + HEAD, r"must have columns"),
        ("\n\n", r"must have columns"),
        (HEAD.encode() + "é,0,1\n".encode("latin-1"), r"must be text in UTF-8"),
        (HEAD.encode("utf-16")[2:], r"must have columns"), (b"\xff\xfe\x00", r"must be text in UTF-8, or in UTF-16"),
        (HEAD.encode() + b"a\0b,0,\0\n", r"(cannot be read as a table|must be a number)"),
        (b"\x89PNG\r\n", r"must be text in UTF-8"),
    ],
)  # fmt: skip
def test_tables_that_say_nothing_sure_are_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "actions.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=message) as raised:
        read_actions(path)
    assert str(path) in str(raised.value)


# ---- LeRobot

CAMERA = "observation.images.top"
PICTURE = encoded(Image.fromarray(np.full((8, 8, 3), 9, np.uint8)))


def write_set(
    folder: Path, version: str = "v2.1", action: Callable[[int], Any] | None = None, dtype: str = "float32"
) -> Path:
    """Three episodes of three frames, pictures in their tables."""
    for part in ("meta/episodes/chunk-000", "data/chunk-000"):
        (folder / part).mkdir(parents=True)
    info: dict[str, Any] = {
        "codebase_version": version, "fps": 10, "total_episodes": 3, "total_frames": 9, "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/{episode_index:02d}.parquet",
        "features": {CAMERA: {"dtype": "image", "shape": [8, 8, 3]}, "action": {"dtype": dtype, "shape": [1]}},
    }  # fmt: skip
    rows = [{"episode_index": e, "length": 3, "data/chunk_index": 0, "data/file_index": e} for e in range(3)]
    for e in range(3):
        columns = {
            "episode_index": [e] * 3, "frame_index": [0, 1, 2], CAMERA: [{"bytes": PICTURE, "path": None}] * 3,
            "action": action(e) if action else [[0.5]] * 3,
        }  # fmt: skip
        pq.write_table(pa.table(columns), folder / f"data/chunk-000/{e:02d}.parquet")
    if version.startswith("v2"):
        (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        info["data_path"] = "data/chunk-{chunk_index:03d}/{file_index:02d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), folder / "meta/episodes/chunk-000/file-000.parquet")
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder


VALUES: tuple[Any, ...] = (
    None,
    -1,
    0,
    2**70,
    1.5,
    True,
    float("nan"),
    "x",
    "",
    "v2",
    [],
    [1],
    {},
    {"a": 1},
    "{",
    "/etc",
    "{0}",
)
USED = ("codebase_version", "fps", "total_episodes", "total_frames", "data_path", "features")


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_broken_info_is_told(tmp_path: Path, version: str) -> None:
    """Whatever stands in place of any field, ValueError names the file; nothing is left in `out`."""
    folder = write_set(tmp_path / "in", version)
    path = folder / "meta/info.json"
    good = json.loads(path.read_text())
    sound = [("fps", 1.5), ("fps", 2**70), ("codebase_version", "v2")]
    broken: list[Any] = [{**good, name: value} for name in USED for value in VALUES if (name, value) not in sound]
    broken += [{k: v for k, v in good.items() if k != name} for name in USED]
    broken += [{**good, "features": {**good["features"], CAMERA: value}} for value in VALUES]
    broken += [{**good, "features": {**good["features"], "action": value}} for value in VALUES]
    broken += [{**good, "features": {"action": good["features"]["action"]}}]
    broken += [[good], None, 3, "x"]
    broken += [
        {**good, "data_path": t}
        for t in (
            "../{episode_index}",
            "{episode_index.real}",
            "{episode_index:q}",
            "{}",
            "{x}",
            "{episode_index:09999999999d}",
            "{video_key:>9999999999}",
            "{episode_index:021d}",
            "{episode_index:{episode_index}d}",
        )
    ]
    for number, info in enumerate(broken):
        path.write_text(json.dumps(info))
        with pytest.raises(ValueError) as raised:
            import_lerobot(folder, tmp_path / "out", progress=False)
        told = str(raised.value)
        plain = type(raised.value) is ValueError and str(folder) in told
        assert plain, (number, info, told)
    for content in ("", "{", "[" * 100_000, "\ufeff"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"info.json cannot be read"):
            import_lerobot(folder, tmp_path / "out", progress=False)
    path.write_bytes(json.dumps(good).encode("utf-16"))
    with pytest.raises(ValueError, match=r"info.json cannot be read"):
        import_lerobot(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    # A byte order mark is no damage, and chunks have a size only where the path is of chunks.
    good.pop("chunks_size")
    path.write_text(json.dumps(good), encoding="utf-8-sig")
    if version == "v2.1":
        with pytest.raises(ValueError, match=r"info.json: chunks_size must be an integer >= 1, got None"):
            import_lerobot(folder, tmp_path / "out", progress=False)
    else:
        import_lerobot(folder, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"episode_index": 0, "length": "3"}', r"episodes.jsonl, line 1: length must be an integer >= 1, got '3'"),
        ('{"episode_index": 0, "length": 0}', r"line 1: length must be an integer >= 1, got 0"),
        ('{"episode_index": 0, "length": null}', r"line 1: length must be an integer >= 1, got None"),
        ('{"episode_index": 0}', r"line 1: length must be an integer >= 1, got None"),
        ('{"episode_index": -1, "length": 3}', r"line 1: episode_index must be an integer >= 0, got -1"),
        ('{"episode_index": true, "length": 3}', r"line 1: episode_index must be an integer >= 0, got True"),
        ('{"length": 3}', r"line 1: episode_index must be an integer"),
        ("[0, 3]", r"episodes.jsonl, line 1 must hold a JSON object, got .0, 3"),
        ("null", r"line 1 must hold a JSON object, got None"),
        ("{", r"line 1 cannot be read"),
        ('{"episode_index": 0, "length": 3}\n\n{"episode_index": 0, "length": 3}', r"line 3: episode 0 appears twice"),
        ('{"episode_index": 0, "length": 3}', r"info.json says total_episodes = 3, but its episodes have 1"),
        ("", r"meta has no episodes"),
    ],
)  # fmt: skip
def test_broken_episodes_are_told(tmp_path: Path, lines: str, message: str) -> None:
    folder = write_set(tmp_path / "in")
    (folder / "meta/episodes.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message) as raised:
        import_lerobot(folder, tmp_path / "out", progress=False)
    assert str(folder) in str(raised.value)


def column(name: str, values: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        found = pq.read_table(path)
        found = found.drop_columns([name])
        pq.write_table(found if values is None else found.append_column(name, pa.array(values)), path)

    return damage


DAMAGED: dict[str, Callable[[Path], object]] = {
    "no file": Path.unlink,
    "no table": lambda path: path.write_text("PAR1"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "no action": column("action", None),
    "no frame numbers": column("frame_index", None),
    "no pictures": column(CAMERA, None),
    "null for an action": column("action", [[0.5], None, [0.5]]),
    "null within an action": column("action", [[0.5], [None], [0.5]]),
    "an action too few": column("action", [[0.5], [], [0.5]]),
    "actions of two sizes": column("action", [[0.5], [0.5, 1], [0.5]]),
    "actions in words": column("action", ["left", "right", "left"]),
    "infinite when cast": column("action", [[0.5], [1e300], [0.5]]),
    "a frame twice": column("frame_index", [0, 1, 1]),
    "frames in words": column("frame_index", ["a", "b", "c"]),
    "null for a frame number": column("frame_index", [0, 1, None]),
    "episodes in words": column("episode_index", ["a", "b", "c"]),
    "another episode": column("episode_index", [0, 0, 0]),
    "null for a picture": column(CAMERA, [{"bytes": PICTURE}, None, {"bytes": PICTURE}]),
    "null within a picture": column(CAMERA, [{"bytes": PICTURE}, {"bytes": None}, {"bytes": PICTURE}]),
    "half a picture": column(CAMERA, [{"bytes": PICTURE}, {"bytes": PICTURE[:40]}, {"bytes": PICTURE}]),
    "numbers for pictures": column(CAMERA, [1, 2, 3]),
    "a picture of another size": column(
        CAMERA, [{"bytes": PICTURE}, {"bytes": encoded(Image.new("RGB", (9, 8)))}, {"bytes": PICTURE}]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_one_damaged_episode_is_left_out(tmp_path: Path, version: str, name: str) -> None:
    folder = write_set(tmp_path / "in", version)
    DAMAGED[name](folder / "data/chunk-000/01.parquet")
    with pytest.raises(ValueError) as raised:
        import_lerobot(folder, tmp_path / "out", progress=False)
    assert type(raised.value) is ValueError and "episode 1" in str(raised.value) and not (tmp_path / "out").exists()
    assert "01.parquet" in str(raised.value) or name == "infinite when cast"
    (reason,) = import_lerobot(folder, tmp_path / "out", skip_damaged=True, progress=False)
    assert "episode 1" in reason
    replay = Replay(tmp_path / "out")
    assert replay.frames == 6 and (replay.video == 9).all() and (replay.action == 0.5).all()


@pytest.mark.parametrize(
    "values",
    [[0, 1, None], [0.5, 1.5, 0.5], ["a", "b", "c"], [[0], [0, 1], [0]], [None] * 3, [0, -1, 1], [0, 1, 2**63 - 1]],
)
def test_one_episode_of_damaged_discrete_actions_is_left_out(tmp_path: Path, values: Any) -> None:
    folder = write_set(tmp_path / "in", action=lambda e: values if e == 1 else [0, 4, 2], dtype="int64")
    with pytest.raises(ValueError, match="episode 1"):
        import_lerobot(folder, tmp_path / "out", progress=False)
    (reason,) = import_lerobot(folder, tmp_path / "out", skip_damaged=True, progress=False)
    replay = Replay(tmp_path / "out")
    assert "episode 1" in reason and replay.actions == 5 and replay.action.tolist() == [0, 4, 2] * 2


@pytest.mark.parametrize("odd", [{"picture": (9, 8)}, {"action": [[0.5, 1.0]] * 3}])
def test_an_odd_first_episode_does_not_leave_out_the_others(tmp_path: Path, odd: dict[str, Any]) -> None:
    folder = write_set(tmp_path / "in")
    path = folder / "data/chunk-000/00.parquet"
    if "picture" in odd:
        column(CAMERA, [{"bytes": encoded(Image.new("RGB", odd["picture"]))}] * 3)(path)
    else:
        column("action", odd["action"])(path)
    with pytest.raises(ValueError, match=r"episode 1: frames and actions must be of sizes .* got .8, 8, 3. and .1."):
        import_lerobot(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    (reason,) = import_lerobot(folder, tmp_path / "out", skip_damaged=True, progress=False)
    assert reason.startswith("episode 0: frames and actions must be of sizes [8, 8, 3] and [1], got")
    assert Replay(tmp_path / "out").frames == 6 and beside(tmp_path / "out") == ["in"]


def test_a_disk_that_is_full_is_no_damaged_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("mfwm.data.replay_writer.ReplayWriter._write", full)
    with pytest.raises(OSError, match="no space left"):
        import_lerobot(write_set(tmp_path / "in"), tmp_path / "out", skip_damaged=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "in", "v3.0")
    for name in ("._file-000.parquet", ".DS_Store", ".file-001.parquet.swp"):
        (folder / "meta/episodes/chunk-000" / name).write_bytes(b"\0\5\x16\7")
    shutil.copytree(folder / "meta/episodes/chunk-000", folder / "meta/episodes/.ipynb_checkpoints")
    (folder / "data/chunk-000/._00.parquet").write_bytes(b"\0\5\x16\7")
    assert import_lerobot(folder, tmp_path / "out", progress=False) == []
    assert Replay(tmp_path / "out").frames == 9


# ---- when a frame is


def write_timed(
    folder: Path, starts: list[float], times: list[list[float]] | None = None, version: str = "v3.0", dtype: Any = None
) -> Path:
    """Episodes of 6, 5 and 6 frames at 10 frames a second, each as bright as ten times its number in the whole."""
    folder, lengths = write_set(folder, version), (6, 5, 6)
    shutil.rmtree(folder / "data")
    (folder / "data").mkdir()
    info = json.loads((folder / "meta/info.json").read_text())
    info |= {"total_frames": 17, "data_path": "data/{episode_index}.parquet", "video_path": "{episode_index}.mp4"}
    if version == "v3.0":
        info |= {"data_path": "data/{file_index}.parquet", "video_path": "{chunk_index}.mp4"}
    info["features"][CAMERA]["dtype"] = "video"
    (folder / "meta/info.json").write_text(json.dumps(info))
    frames = [np.full((32, 32, 3), 10 * t, np.uint8) for t in range(17)]
    rows, first = [], 0
    for e, length in enumerate(lengths):
        rows.append({"episode_index": e, "length": length, "data/chunk_index": 0, "data/file_index": e})
        if version == "v3.0":
            rows[-1] |= {f"videos/{CAMERA}/{n}_index": 0 for n in ("chunk", "file")}
            rows[-1][f"videos/{CAMERA}/from_timestamp"] = starts[e]
        else:
            write_mp4(folder / f"{e}.mp4", np.stack(frames[first : first + length]))
        columns = {"episode_index": [e] * length, "frame_index": list(range(length)), "action": [[0.5]] * length}
        if times:
            columns["timestamp"] = pa.array(times[e], dtype)
        pq.write_table(pa.table(columns), folder / f"data/{e}.parquet")
        first += length
    if version == "v3.0":
        write_mp4(folder / "0.mp4", np.stack(frames))
        pq.write_table(pa.Table.from_pylist(rows), folder / "meta/episodes/chunk-000/file-000.parquet")
    else:
        (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shown(path: Path) -> list[int]:
    return [int(value) for value in (Replay(path).video.mean(axis=(1, 2, 3)) / 10).round()]


RIGHT = [[t / 10 for t in range(length)] for length in (6, 5, 6)]


@pytest.mark.parametrize("times", [None, RIGHT])
@pytest.mark.parametrize("off", [0.0, 9e-5, -9e-5])
def test_frames_are_those_of_their_times(tmp_path: Path, times: Any, off: float) -> None:
    folder = write_timed(tmp_path / "in", [0.0, 0.6 + off, 1.1], times, dtype=pa.float32())
    assert import_lerobot(folder, tmp_path / "out", progress=False) == []
    assert shown(tmp_path / "out") == list(range(17))


@pytest.mark.parametrize("off", [0.06, 0.04, -0.04, -0.06, 0.0003, -0.0003])
def test_a_start_between_two_frames_is_refused(tmp_path: Path, off: float) -> None:
    folder = write_timed(tmp_path / "in", [0.0, 0.6 + off, 1.1])
    with pytest.raises(ValueError, match=r"episode 1: .*0.mp4 must have a frame at 0.\d+ s, got one at .* s later"):
        import_lerobot(folder, tmp_path / "out", progress=False)
    assert len(import_lerobot(folder, tmp_path / "out", skip_damaged=True, progress=False)) == 1
    assert shown(tmp_path / "out") == [*range(6), *range(11, 17)]


@pytest.mark.parametrize("off", [0.1, -0.1, 0.2])
def test_episodes_that_share_frames_are_refused(tmp_path: Path, off: float) -> None:
    """Off by whole frames there is a frame at every time, and only the other episodes tell."""
    folder = write_timed(tmp_path / "in", [0.0, 0.6 + off, 1.1])
    with pytest.raises(ValueError, match=r"0.mp4: episodes must not overlap: the last frame of episode"):
        import_lerobot(folder, tmp_path / "out", progress=False)
    assert len(import_lerobot(folder, tmp_path / "out", skip_damaged=True, progress=False)) == 2
    assert shown(tmp_path / "out") == ([*range(6)] if off > 0 else [*range(11, 17)])


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.05, 0.15, 0.25, 0.35, 0.45], r"must have a frame at 0.\d50 s"),
        ([0.0, 0.1, 0.2, 0.4, 0.5], r"of episode 1 must grow by 0.100000 s, .* got 0.2 s and 0.4 s at frames 2 and 3"),
        ([0.0, 0.1, 0.1, 0.2, 0.3], r"timestamp of episode 1 must grow by 0.100000 s"),
        ([0.0, 0.1, None, 0.3, 0.4], r"timestamp of episode 1 must be seconds, got None"),
        ([0.0, 0.1, float("nan"), 0.3, 0.4], r"timestamp of episode 1 must grow by"),
    ],
)  # fmt: skip
def test_times_of_the_table_are_read(tmp_path: Path, version: str, times: Any, message: str) -> None:
    folder = write_timed(tmp_path / "in", [0.0, 0.6, 1.1], [RIGHT[0], times, RIGHT[2]], version)
    with pytest.raises(ValueError, match=message):
        import_lerobot(folder, tmp_path / "out", progress=False)


def test_a_table_may_begin_later_than_its_video(tmp_path: Path) -> None:
    """Its times say which frame is which."""
    late = [[time + 0.1 for time in times] for times in RIGHT]
    folder = write_timed(tmp_path / "in", [0.0, 0.52, 1.1], [RIGHT[0], [t + 0.08 for t in RIGHT[1]], RIGHT[2]])
    import_lerobot(folder, tmp_path / "out", progress=False)
    assert shown(tmp_path / "out") == list(range(17))
    folder = write_timed(tmp_path / "late", [0.0, 0.6, 1.1], [*RIGHT[:2], late[2]])
    with pytest.raises(ValueError, match=r"episode 2: .* must have a frame at 1.700 s, got the end of the file"):
        import_lerobot(folder, tmp_path / "late_out", progress=False)


@pytest.mark.parametrize("size", [(0, 8), (8, -1), (8,), (8, 8.0), (8, 10**6)])
def test_sizes_that_are_none_are_refused(tmp_path: Path, size: Any) -> None:
    folder = write_set(tmp_path / "in")
    (folder / "actions.csv").write_text("video,frame,action\na.mp4,0,0\n")
    for run in (import_lerobot, import_videos):
        with pytest.raises(ValueError, match=r"size must be a height and a width in pixels, in 1\.\.32767"):
            run(folder, tmp_path / "out", size=size, skip_damaged=True, progress=False)


@pytest.mark.parametrize("damage", ["missing", "a folder", "empty", "text", "another size", "no end"])
def test_one_damaged_video_is_left_out(tmp_path: Path, damage: str) -> None:
    frames = np.full((5, 32, 32, 3), 90, np.uint8)
    for name in "abc":
        write_mp4(tmp_path / f"in/{name}.mp4", frames)
    path = tmp_path / "in/a.mp4"
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "another size":
        write_mp4(path, np.full((5, 32, 48, 3), 90, np.uint8))
    elif damage != "missing":
        path.write_bytes(
            {"empty": b"", "text": b"no video", "no end": (tmp_path / "in/b.mp4").read_bytes()[:-99]}[damage]
        )
    (tmp_path / "in/actions.csv").write_text(
        "video,frame,action\n" + "".join(f"{name}.mp4,{t},1\n" for name in "abc" for t in range(5))
    )
    with pytest.raises(ValueError, match=r"a.mp4|b.mp4"):
        import_videos(tmp_path / "in", tmp_path / "out", progress=False)
    (reason,) = import_videos(tmp_path / "in", tmp_path / "out", skip_damaged=True, progress=False)
    assert "a.mp4" in reason and Replay(tmp_path / "out").frames == 10


# ---- token memmaps


def write_tokens(folder: Path) -> Path:
    (folder / "actions").mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"num_images": 4, "s": 2, "vocab_size": 64}))
    np.arange(16, dtype=np.uint32).tofile(folder / "video.bin")
    np.array([0, 0, 1, 1], np.int32).tofile(folder / "segment_ids.bin")
    np.ones((4, 3), np.float32).tofile(folder / "actions/joint.bin")
    return folder


def test_broken_metadata_of_tokens_is_told(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path / "in")
    path = folder / "metadata.json"
    good = {**json.loads(path.read_text()), "token_dtype": "uint32"}
    broken: list[Any] = [{**good, name: value} for name in good for value in VALUES]
    broken += [{k: v for k, v in good.items() if k != name} for name in ("num_images", "s", "vocab_size")]
    broken += [{**good, "token_dtype": name} for name in ("float32", "token", "O", "uint64", "i4,,", {"names": ["a"]})]
    broken += [{**good, "h": 2, "w": None}, {**good, "h": 2**62, "w": 4}, [good], None, 3, "x"]
    for metadata in broken:
        path.write_text(json.dumps(metadata))
        with pytest.raises(ValueError, match=str(folder)) as raised:
            import_tokens(folder, tmp_path / "out", progress=False)
        assert type(raised.value) is ValueError
    for content in ("", "{", "[" * 100_000):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"metadata.json cannot be read"):
            import_tokens(folder, tmp_path / "out", progress=False)
    path.write_text(json.dumps(good))
    for ids in (-1, 0, 5, 2**40, 1.5, True, None):
        with pytest.raises(ValueError, match=r"ids must satisfy n \*\* ids = 64, the vocabulary, .*; got"):
            import_tokens(folder, tmp_path / "out", ids=ids, progress=False)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_hidden_files_are_no_actions(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path / "in")
    for name in ("._joint.bin", ".DS_Store", ".nfs01.bin", "Thumbs.db", "joint.bin~"):
        (folder / "actions" / name).write_bytes(np.zeros(8, np.float32).tobytes())
    import_tokens(folder, tmp_path / "out", progress=False)
    assert Replay(tmp_path / "out").action.tolist() == [[1.0] * 3] * 4


@pytest.mark.parametrize(
    ("dtype", "value"), [("uint64", 2**63 + 1), ("int64", -1), ("uint8", 200), ("uint32", 2**32 - 1)]
)
def test_ids_are_checked_as_they_are_stored(tmp_path: Path, dtype: str, value: int) -> None:
    folder = write_tokens(tmp_path / "in")
    tokens = np.zeros(16, dtype)
    tokens[9] = value
    tokens.tofile(folder / "video.bin")
    (folder / "metadata.json").write_text(json.dumps({"num_images": 4, "s": 2, "vocab_size": 64, "token_dtype": dtype}))
    with pytest.raises(ValueError, match=rf"frames 2 to 3: ids must be in 0..63, got -?\d+..{max(value, 0)}"):
        import_tokens(folder, tmp_path / "out", progress=False)
    assert len(import_tokens(folder, tmp_path / "out", skip_damaged=True, progress=False)) == 1
