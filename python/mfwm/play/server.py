"""The server of a walk: one page and one WebSocket, for whoever has the token."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import secrets
import signal
import socket
import threading
import webbrowser
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import WSMsgType, web

from . import protocol
from .clients import Client
from .game_loop import GameLoop

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/play.css": ("play.css", "text/css"),
    "/play.js": ("play.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# How often a browser is asked whether it is still there.
HEARTBEAT_S = 10.0
MOST_CLIENTS = 64
# The close code of a message that is refused.
POLICY = 1008

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Serves a walk to browsers that know `token`."""

    def __init__(self, game: GameLoop, *, token: str | None = None) -> None:
        self.game = game
        self.token = token or secrets.token_urlsafe(24)
        self.app = web.Application(middlewares=[self.guard], client_max_size=protocol.MESSAGE_LIMIT)
        self.app.router.add_get("/socket", self.connect)
        for path in FILES:
            self.app.router.add_get(path, self.file)
        self.app.on_startup.append(self._begin)
        self.app.on_shutdown.append(self._say_goodbye)
        self.app.on_cleanup.append(self._end)
        self.task: asyncio.Task[None] | None = None
        # Where the server listens; requests that name another host or come from another page are refused.
        self.local = True

    async def _begin(self, app: web.Application) -> None:
        self.task = asyncio.create_task(self.game.run(), name="play: game loop")

    async def _say_goodbye(self, app: web.Application) -> None:
        goodbyes = [
            client.socket.close(code=1001, message=b"the server has stopped") for client in self.game.room.clients
        ]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await asyncio.gather(*goodbyes, return_exceptions=True)

    async def _end(self, app: web.Application) -> None:
        if self.task is not None:
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.task
        await self.game.record(False)
        self.game.close()

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse requests without the token, of other pages, and to other hosts, before anything else is looked at."""
        refusal = self.refusal(request)
        if refusal is not None:
            return web.Response(status=403, text=refusal + "\n", headers=HEADERS)
        try:
            return await handler(request)
        except web.HTTPException as error:
            error.headers.update(HEADERS)
            raise

    def refusal(self, request: web.Request) -> str | None:
        """Why a request is refused; None if it is not."""
        given = request.query.getall("token", [])
        if len(given) != 1 or not hmac.compare_digest(given[0].encode(errors="replace"), self.token.encode()):
            return "the token is missing or wrong: open the URL that `mfwm play` printed"
        # A name that some DNS server gave this machine's address is not one that this server printed.
        if self.local and not is_local(urlsplit(f"//{request.host}").hostname):
            return "this server is reached by 127.0.0.1 or localhost only"
        origin = request.headers.get("Origin")
        if origin is None:
            return "a WebSocket needs an Origin" if request.path == "/socket" else None
        return None if origin == f"http://{request.host}" else "requests of other pages are refused"

    async def file(self, request: web.Request) -> web.Response:
        name, kind = FILES[request.path]
        text = (PAGE / name).read_text(encoding="utf-8")
        if request.path == "/":
            text = text.replace("TOKEN", self.token)
        return web.Response(text=text, content_type=kind, headers=HEADERS)

    async def connect(self, request: web.Request) -> web.StreamResponse:
        if len(self.game.room.clients) >= MOST_CLIENTS:
            raise web.HTTPServiceUnavailable(text=f"{MOST_CLIENTS} browsers watch already\n")
        ws = web.WebSocketResponse(
            timeout=1.0, heartbeat=HEARTBEAT_S, max_msg_size=protocol.MESSAGE_LIMIT, compress=False
        )
        await ws.prepare(request)
        client = Client(ws)
        self.game.join(client)
        sending = asyncio.create_task(client.send_news(), name="play: client")
        # Disconnect a browser that no longer receives, even if it still sends.
        sending.add_done_callback(lambda _: abort(request))
        try:
            async for message in ws:
                if message.type != WSMsgType.TEXT:
                    await ws.close(code=1003, message=b"messages are text")
                    break
                try:
                    self.game.take(client, protocol.parsed(message.data))
                except ValueError as error:
                    await ws.close(code=POLICY, message=str(error).encode()[:120])
                    break
        finally:
            self.game.part(client)
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending
        return ws


def abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def is_local(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


async def serve(server: Server, *, host: str, port: int, browser: bool) -> None:
    """Listen until Ctrl-C or SIGTERM."""
    listening = listen(host, port)
    address, port = listening.getsockname()[:2]
    server.local = ipaddress.ip_address(address).is_loopback
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    runner = web.AppRunner(server.app, access_log=None, handle_signals=False, shutdown_timeout=0.2)
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        # An address for all interfaces is not one to open.
        name = "127.0.0.1" if ipaddress.ip_address(address).is_unspecified else address
        url = f"http://{f'[{name}]' if ':' in name else name}:{port}/?token={server.token}"
        print(f"play: {url}", flush=True)
        print("play: Ctrl-C stops", flush=True)
        if browser:
            # Some browsers return only when they are closed.
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        assert server.task is not None
        waiting = asyncio.create_task(stopped.wait())
        await asyncio.wait({waiting, server.task}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if server.task.done():
            server.task.result()
    finally:
        await runner.cleanup()
    print("play: stopped", flush=True)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. OSError names host and port."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol_number, _, address = found[0]
        listening = socket.socket(family, kind, protocol_number)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(64)
    except OSError as error:
        raise OSError(f"host {host}, port {port} cannot be listened on: {error}") from error
    return listening
