"""The browsers that watch: each gets the newest moment and the newest state, and never holds up the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from aiohttp import ClientConnectionError, web

# A browser that receives nothing for so long is disconnected.
SEND_LIMIT_S = 10.0


class Client:
    """A WebSocket and what is still to be sent to it: at most one moment and one state, whatever its pace."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self.socket = socket
        self.moment: bytes | None = None
        self.state: dict[str, Any] | None = None
        self.first: list[bytes | str] = []
        self.news = asyncio.Event()

    def show(self, moment: bytes) -> None:
        """Replace the moment that waits, if there is one: a slow browser skips it."""
        self.moment = moment
        self.news.set()

    def tell(self, state: dict[str, Any]) -> None:
        self.state = state
        self.news.set()

    async def send_news(self) -> None:
        """Send whatever is newest until the browser is gone."""
        with contextlib.suppress(ClientConnectionError, ConnectionError, TimeoutError):
            for message in self.first:
                await self._send(message)
            self.first.clear()
            while not self.socket.closed:
                await self.news.wait()
                self.news.clear()
                state, self.state = self.state, None
                if state is not None:
                    await self._send(json.dumps({"kind": "state", **state}))
                moment, self.moment = self.moment, None
                if moment is not None:
                    await self._send(moment)

    async def _send(self, message: bytes | str) -> None:
        async with asyncio.timeout(SEND_LIMIT_S):
            if isinstance(message, bytes):
                await self.socket.send_bytes(message)
            else:
                await self.socket.send_str(message)


class Room:
    """All clients. One of them plays; a viewer may ask for the controls, and gets them when the player gives or leaves.

    A player who has touched nothing for `idle_s` seconds loses them to the first who asks.
    """

    def __init__(self, idle_s: float = 30.0) -> None:
        self.idle_s = idle_s
        self.clients: list[Client] = []
        self.player: Client | None = None
        self.asking: list[Client] = []
        self.touched = 0.0

    def enter(self, client: Client, now: float) -> None:
        self.clients.append(client)
        if self.player is None:
            self._hand_to(client, now)

    def leave(self, client: Client, now: float) -> None:
        self.clients.remove(client)
        if client in self.asking:
            self.asking.remove(client)
        if self.player is client:
            self.player = None
            if self.clients:
                self._hand_to((self.asking or self.clients)[0], now)

    def touch(self, now: float) -> None:
        """The player did something."""
        self.touched = now

    def ask(self, client: Client, now: float) -> None:
        if client is self.player:
            return
        if now - self.touched >= self.idle_s:
            self._hand_to(client, now)
        elif client not in self.asking:
            self.asking.append(client)

    def give(self, now: float) -> None:
        """Hand the controls to the first who asked."""
        if self.asking:
            self._hand_to(self.asking[0], now)

    def _hand_to(self, client: Client, now: float) -> None:
        self.player, self.touched = client, now
        if client in self.asking:
            self.asking.remove(client)
