"""The server of mfwm play: who is let in, what is refused, and that nothing of a browser stays when it is gone."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import test_utils
from mfwm.data.check import check
from mfwm.play import protocol
from mfwm.play.clients import Client, Room
from mfwm.play.server import Server, is_local
from mfwm.play.world import World, load_world
from play_run import trained, walking

Visit = Callable[[Server, test_utils.TestServer, aiohttp.ClientSession], Awaitable[None]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return load_world(trained(tmp_path_factory.mktemp("play"), steps=1))


def visit(world: World, scene: Visit, **options: Any) -> None:
    """Run `scene` against a server that listens."""

    async def run() -> None:
        with walking(world, token="secret", **options) as server:
            async with test_utils.TestServer(server.app) as listening, aiohttp.ClientSession() as session:
                await scene(server, listening, session)

    asyncio.run(asyncio.wait_for(run(), 60))


def url_of(listening: test_utils.TestServer, path: str = "/", token: str = "?token=secret") -> str:
    return f"http://127.0.0.1:{listening.port}{path}{token}"


def origin_of(listening: test_utils.TestServer) -> str:
    return f"http://127.0.0.1:{listening.port}"


async def connected(
    listening: test_utils.TestServer, session: aiohttp.ClientSession
) -> aiohttp.ClientWebSocketResponse:
    return await session.ws_connect(url_of(listening, "/socket"), origin=origin_of(listening))


async def moments(socket: aiohttp.ClientWebSocketResponse, count: int) -> list[tuple[Any, ...]]:
    """The headers of the next `count` moments."""
    found: list[tuple[Any, ...]] = []
    while len(found) < count:
        message = await socket.receive(20)
        assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message
        if message.type == aiohttp.WSMsgType.BINARY and message.data[0] == protocol.MOMENT_KIND:
            found.append(protocol.HEADER.unpack_from(message.data))
    return found


def tasks(name: str) -> int:
    return sum(task.get_name() == name for task in asyncio.all_tasks())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not happen within 8 s")


def test_the_page_is_served_to_those_with_the_token(world: World) -> None:
    async def scene(server: Server, listening: test_utils.TestServer, session: aiohttp.ClientSession) -> None:
        for path, words in (("/", "mfwm play"), ("/play.js", "WebSocket"), ("/play.css", "pixelated")):
            async with session.get(url_of(listening, path)) as answer:
                assert answer.status == 200 and words in await answer.text()
                assert "default-src 'none'" in answer.headers["Content-Security-Policy"]

    visit(world, scene)


REFUSED = [
    ("/", "", {}, 403),
    ("/", "?token=", {}, 403),
    ("/", "?token=Secret", {}, 403),
    ("/", "?token=s%C3%A9cret", {}, 403),
    ("/", "?token=secret&token=secret", {}, 403),
    ("/play.js", "", {}, 403),
    ("/socket", "", {"Origin": "SELF"}, 403),
    ("/socket", "?token=secret", {}, 403),
    ("/socket", "?token=secret", {"Origin": "http://evil.example"}, 403),
    ("/socket", "?token=secret", {"Origin": "null"}, 403),
    ("/", "?token=secret", {"Origin": "http://evil.example"}, 403),
    ("/", "?token=secret", {"Host": "evil.example"}, 403),
    ("/", "?token=secret", {"Host": "127.0.0.1.evil.example"}, 403),
    ("/../pyproject.toml", "?token=secret", {}, 404),
    ("/..%2f..%2fworld.py", "?token=secret", {}, 404),
    ("/page/../../world.py", "?token=secret", {}, 404),
    ("/index.html", "?token=secret", {}, 404),
    ("//etc/passwd", "?token=secret", {}, 404),
]


@pytest.mark.parametrize(("path", "token", "headers", "status"), REFUSED)
def test_requests_that_are_refused(world: World, path: str, token: str, headers: dict[str, str], status: int) -> None:
    async def scene(server: Server, listening: test_utils.TestServer, session: aiohttp.ClientSession) -> None:
        # Written by hand, because a client tidies paths.
        lines = {"Host": f"127.0.0.1:{listening.port}", "Connection": "close"}
        if path == "/socket":
            lines |= {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
            lines["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
        lines |= {name: origin_of(listening) if value == "SELF" else value for name, value in headers.items()}
        reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(f"GET {path}{token} HTTP/1.1\r\n{head}\r\n".encode())
        first = await reader.readline()
        assert int(first.split()[1]) == status, first
        writer.close()
        assert not server.game.room.clients
        await (await connected(listening, session)).close()

    visit(world, scene)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("x", 1008),
        ('{"kind": "act", "number": 1, "action": 99}', 1008),
        ('{"kind": "reset", "start": 99}', 1008),
        ('{"kind": "temperature", "value": 1}', 1008),
        (b"\x00", 1003),
        ('{"kind": "' + "x" * protocol.MESSAGE_LIMIT + '"}', 1009),
        (b"x" * (protocol.MESSAGE_LIMIT + 1), 1009),
    ],
)
def test_a_malformed_message_closes_its_socket_and_no_other(world: World, message: str | bytes, code: int) -> None:
    async def scene(server: Server, listening: test_utils.TestServer, session: aiohttp.ClientSession) -> None:
        rude = await connected(listening, session)
        polite = await connected(listening, session)
        await moments(rude, 1)
        await (rude.send_str(message) if isinstance(message, str) else rude.send_bytes(message))
        while not rude.closed:
            await rude.receive(20)
        assert rude.close_code == code
        await moments(polite, 3)
        await until(lambda: len(server.game.room.clients) == 1)

    visit(world, scene)


def test_clients_that_vanish_leave_nothing(world: World) -> None:
    async def scene(server: Server, listening: test_utils.TestServer, session: aiohttp.ClientSession) -> None:
        traces: list[weakref.ref[Client]] = []
        for _ in range(20):
            async with aiohttp.ClientSession() as own:
                socket = await connected(listening, own)
                await moments(socket, 1)
                traces += [weakref.ref(client) for client in server.game.room.clients]
                # Cut off, without a closing handshake.
                assert socket._response.connection is not None and socket._response.connection.transport is not None
                socket._response.connection.transport.abort()
        await until(lambda: not server.game.room.clients and tasks("play: client") == 0)
        gc.collect()
        assert len(traces) >= 20 and not [trace for trace in traces if trace() is not None]
        # Nobody watches, so nothing is computed.
        await asyncio.sleep(0.2)
        shown = server.game.moment
        await asyncio.sleep(0.3)
        assert server.game.moment is shown and tasks("play: game loop") == 1
        await moments(await connected(listening, session), 3)

    visit(world, scene)


def test_a_slow_client_skips_moments() -> None:
    async def run() -> None:
        sent: list[Any] = []
        free = asyncio.Event()

        class Socket:
            closed = False

            async def send_bytes(self, data: bytes) -> None:
                sent.append(data)
                await free.wait()

            async def send_str(self, data: str) -> None:
                sent.append(json.loads(data)["i"])

        client = Client(Socket())  # type: ignore[arg-type]
        task = asyncio.create_task(client.send_news())
        for i in range(1000):
            client.show(bytes([i % 256]))
            client.tell({"i": i})
            await asyncio.sleep(0)
        assert len(sent) == 2
        free.set()
        await asyncio.sleep(0.05)
        assert sent == [0, b"\x00", 999, bytes([999 % 256])]
        task.cancel()

    asyncio.run(run())


def test_a_client_that_takes_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        class Socket:
            closed = False

            async def send_bytes(self, data: bytes) -> None:
                await asyncio.Event().wait()

        client = Client(Socket())  # type: ignore[arg-type]
        client.show(b"x")
        await asyncio.wait_for(client.send_news(), 5)

    monkeypatch.setattr("mfwm.play.clients.SEND_LIMIT_S", 0.05)
    asyncio.run(run())


def test_the_newest_input_wins(world: World) -> None:
    async def scene(server: Server, listening: test_utils.TestServer, session: aiohttp.ClientSession) -> None:
        socket = await connected(listening, session)
        await moments(socket, 2)
        for number in range(1, 6):
            await socket.send_json({"kind": "act", "number": number, "action": number % 4})
        while (await moments(socket, 1))[0][7] != 5:
            pass
        assert server.game.action == 1
        await socket.close()
        await until(lambda: server.game.action == server.game.world.actions.rest)

    visit(world, scene, fps=5)


def test_a_key_is_seen_half_a_frame_before_its_tick_and_the_pace_stays(world: World) -> None:
    async def scene(server: Server, listening: test_utils.TestServer, session: aiohttp.ClientSession) -> None:
        socket = await connected(listening, session)
        await moments(socket, 2)
        began, waits = time.monotonic(), []
        for number in range(1, 7):
            # Just after a frame, whose next one is a quarter of a second away.
            sent = time.monotonic()
            await socket.send_json({"kind": "act", "number": number, "action": number % 4})
            while (await moments(socket, 1))[0][7] != number:
                pass
            waits.append(time.monotonic() - sent)
            await moments(socket, 1)
        # Twelve frames, each after a quarter of a second on average.
        assert min(waits) < 0.2 and time.monotonic() - began > 2.5

    visit(world, scene, fps=4)


def test_pause_steps_and_reset(world: World) -> None:
    async def scene(server: Server, listening: test_utils.TestServer, session: aiohttp.ClientSession) -> None:
        socket = await connected(listening, session)
        await moments(socket, 3)
        await socket.send_json({"kind": "pause", "on": True})
        await asyncio.sleep(0.3)
        assert server.game.moment is not None
        step = server.game.moment.step
        await asyncio.sleep(0.2)
        assert server.game.moment.step == step
        # Keys change what is expected, and not the frame.
        frame = server.game.moment.frame
        await socket.send_json({"kind": "act", "number": 1, "action": 2})
        await until(lambda: server.game.plan_shown == [2] * 8)
        assert server.game.moment.step == step and server.game.moment.frame is frame
        await socket.send_json({"kind": "step"})
        await until(lambda: server.game.moment is not None and server.game.moment.step == step + 1)
        await socket.send_json({"kind": "reset", "start": 1})
        await until(lambda: server.game.moment is not None and server.game.moment.step == 0)
        assert server.game.start == 1 and server.game.paused

    visit(world, scene)


def test_a_recording_by_messages(world: World) -> None:
    async def scene(server: Server, listening: test_utils.TestServer, session: aiohttp.ClientSession) -> None:
        socket = await connected(listening, session)
        await socket.send_json({"kind": "record", "on": True})
        await moments(socket, 20)
        await socket.send_json({"kind": "record", "on": False})
        await until(lambda: "frames recorded" in server.game.notice)
        path = server.game.notice.split(": ")[1].split(" and ")[0]
        assert check(path, 8) == []

    visit(world, scene)


def test_a_recording_that_cannot_be_written_is_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(server: Server, listening: test_utils.TestServer, session: aiohttp.ClientSession) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        socket, game = await connected(listening, session), server.game
        await socket.send_json({"kind": "record", "on": True})
        await moments(socket, 12)
        with monkeypatch.context() as patched:
            patched.setattr("mfwm.play.game_loop.write", full)
            await socket.send_json({"kind": "record", "on": False})
            await until(lambda: "could not be written: [Errno 28] No space left on device" in game.notice)
        assert game.recorder.on
        await socket.send_json({"kind": "record", "on": False})
        await until(lambda: "frames recorded" in game.notice)
        assert not any(problem.invalid for problem in check(game.notice.split(": ")[1].split(" and ")[0], 4))

    visit(world, scene)


def test_viewers_have_no_say_until_they_get_the_controls(world: World) -> None:
    async def scene(server: Server, listening: test_utils.TestServer, session: aiohttp.ClientSession) -> None:
        player, viewer = await connected(listening, session), await connected(listening, session)
        room = server.game.room
        await until(lambda: len(room.clients) == 2)
        await viewer.send_json({"kind": "pause", "on": True})
        await viewer.send_json({"kind": "ask"})
        await until(lambda: len(room.asking) == 1)
        assert not server.game.paused
        await player.send_json({"kind": "give"})
        await until(lambda: room.player is room.clients[1])
        await viewer.send_json({"kind": "pause", "on": True})
        await until(lambda: server.game.paused)
        await viewer.close()
        await until(lambda: room.player is room.clients[0])

    visit(world, scene)


def test_the_controls_go_to_who_asked_first_and_from_who_is_idle() -> None:
    room = Room(idle_s=30)
    one, two, three = (Client(None) for _ in range(3))  # type: ignore[arg-type]
    for client in (one, two, three):
        room.enter(client, 0)
    room.ask(three, 10)
    room.ask(two, 11)
    room.ask(one, 11)
    assert room.player is one and room.asking == [three, two]
    room.give(12)
    assert room.player is three and room.asking == [two]
    room.leave(three, 13)
    assert room.player is two and room.asking == []
    room.ask(one, 42)
    assert room.player is two
    room.asking.clear()
    room.ask(one, 43.5)
    assert room.player is one


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.9.9.9", True), ("10.0.0.1", False), (None, False)],
)
def test_local_hosts(host: str | None, local: bool) -> None:
    assert is_local(host) == local


def test_ctrl_c_stops_within_a_second(world: World) -> None:
    command = [sys.executable, "-m", "mfwm.cli", "play", str(world.run), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        while first and "http://127.0.0.1" not in first:
            first = process.stdout.readline()
        url = re.search(r"http\S+", first)
        assert url, process.stderr.read()

        async def watch() -> float:
            async with aiohttp.ClientSession() as session:
                origin = url[0].partition("/?")[0]
                socket = await session.ws_connect(url[0].replace("/?", "/socket?"), origin=origin)
                await moments(socket, 3)
                began = time.monotonic()
                os.kill(process.pid, signal.SIGINT)
                while process.poll() is None and time.monotonic() - began < 10:
                    await asyncio.sleep(0.01)
                return time.monotonic() - began

        assert asyncio.run(watch()) < 1
        assert process.returncode == 0 and process.stdout.read().endswith("play: stopped\n")
        assert process.stderr.read() == ""
