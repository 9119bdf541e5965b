"""Measures mfwm play over its WebSocket, with the demo's model: frames per second with panels, and from key to frame.

    python -m benchmarks.play [--run RUN] [--threads 2]

Without a run, one with the demo's model is trained for one step on balls of 64 x 64: a walk costs the same whatever the
weights. Each row is a server that multiplies in fp32 or in bf16. "fps" is without pacing. Latency is from sending a key
to having the frame that followed from it, at the default pace of 15 frames a second. "first_frame_s" is from starting
the command to the first generated frame. "cpu_ms_per_frame" is the time of all cores together, which other programs
hardly change. "load" is the machine's load average over the minute before: above the number of cores, other programs
slowed this one down.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from mfwm.data.collect import collect
from mfwm.data.replay import Replay
from mfwm.play import protocol
from mfwm.presets import DEMO
from mfwm.training.checkpoints import write_atomically
from mfwm.training.world_model import for_replay, train

from mfwm_kernels import info

RESULTS = Path(__file__).parent / "results" / "play.json"
FRAMES, WARMUP, KEYS = 200, 20, 60


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.play", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a run with the demo's model; one is trained if it is not given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run or demo_run(Path(folder))
        products = ["fp32", "bf16"] if info.environment()["cpu_multiplies_bf16"] else ["fp32"]
        rows = [measured(run, products=kind, threads=arguments.threads) for kind in products]
    for row in rows:
        print(json.dumps(row))
    environment = {**info.environment(), "threads": arguments.threads}
    result = {"environment": environment, "date": time.strftime("%Y-%m-%d"), "model": "demo", "rows": rows}
    write_atomically(arguments.out, (json.dumps(result, indent=1) + "\n").encode())


def demo_run(folder: Path) -> Path:
    collect("balls", 1500, folder / "data", size=64, progress=False)
    config = replace(DEMO, data=str(folder / "data"), steps=1, held_out=0.3, look_every=0, tensorboard=False)
    train(for_replay(config, Replay(folder / "data")), folder / "run", progress=False)
    return folder / "run"


def measured(run: Path, *, products: str, threads: int) -> dict[str, Any]:
    with served(run, "--fps", "120", products=products, threads=threads) as (url, began, server):
        first, seconds, cpu = asyncio.run(unpaced(url, began, server))
    with served(run, products=products, threads=threads) as (url, _, _):
        latencies = asyncio.run(from_key_to_frame(url))
    return {
        "products": products,
        "fps": FRAMES / seconds,
        "cpu_ms_per_frame": 1000 * cpu / FRAMES,
        "latency_ms": {name: float(np.percentile(latencies, q)) for name, q in (("p50", 50), ("p95", 95))},
        "first_frame_s": first,
        "load": os.getloadavg()[0],
    }


@contextmanager
def served(run: Path, *options: str, products: str, threads: int) -> Iterator[tuple[str, float, int]]:
    """The URL of a server, when its command was started, and its process."""
    command = [sys.executable, "-m", "mfwm.cli", "play", str(run), "--no-browser", "--no-game", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MFWM_CPU_PRODUCTS": products}
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            url = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
            yield url, began, process.pid
        finally:
            process.terminate()
            process.communicate()


async def unpaced(url: str, began: float, server: int) -> tuple[float, float, float]:
    """Seconds from `began` to the first generated frame, for FRAMES frames after WARMUP, and of the CPU for those."""
    async with aiohttp.ClientSession() as session, connected(session, url) as socket:
        await moment(socket, lambda header: header[6] >= 1)
        first = time.perf_counter() - began
        start = await moment(socket, lambda header: header[6] >= WARMUP)
        begin, used = time.perf_counter(), cpu_seconds(server)
        await moment(socket, lambda header: header[6] >= start[6] + FRAMES)
        return first, time.perf_counter() - begin, cpu_seconds(server) - used


def cpu_seconds(process: int) -> float:
    """Seconds of CPU time that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def from_key_to_frame(url: str) -> list[float]:
    """Milliseconds from sending each of KEYS keys to having the frame that was computed with it."""
    async with aiohttp.ClientSession() as session, connected(session, url) as socket:
        await moment(socket, lambda header: header[6] >= WARMUP)
        draw, found = random.Random(0), []
        for number in range(1, KEYS + 1):
            # Keys are pressed at any time between two frames.
            until = time.perf_counter() + draw.uniform(0.2, 0.4)
            while time.perf_counter() < until:
                await moment(socket, lambda _: True)
            await asyncio.sleep(draw.uniform(0, 0.06))
            sent = time.perf_counter()
            await socket.send_json({"kind": "act", "number": number, "action": number % 5})
            await moment(socket, lambda header, number=number: header[7] >= number)
            found.append(1000 * (time.perf_counter() - sent))
        return found


def connected(session: aiohttp.ClientSession, url: str) -> Any:
    return session.ws_connect(url.replace("/?", "/socket?"), origin=url.partition("/?")[0])


async def moment(socket: aiohttp.ClientWebSocketResponse, wanted: Any) -> tuple[Any, ...]:
    """The header of the next moment for which `wanted` holds."""
    while True:
        message = await socket.receive(60)
        if message.type == aiohttp.WSMsgType.BINARY and message.data[0] == protocol.MOMENT_KIND:
            header = protocol.HEADER.unpack_from(message.data)
            if wanted(header):
                return header
        elif message.type != aiohttp.WSMsgType.TEXT and message.type != aiohttp.WSMsgType.BINARY:
            raise RuntimeError(f"the server closed: {message}")


if __name__ == "__main__":
    main()
