"""Requests per second and latency of engines of one model behind ``vflow-export serve``, with the same memory for KV caches.

    python tools/measure_serving.py out/tiny-unpruned out/tiny-keep-10 --slots 4

The first engine is the yardstick: its ``--slots`` requests set the memory, and the others get as many slots as fit into it. Engines take turns,
``--rounds`` times, each with a server of its own that is asked by 1, 4 and 16 clients over HTTP, each of which sends its next request when it has the
answer. Questions are about generated scenes of several sizes.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import platform
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from PIL import Image
from vflow.engines import open_engine
from vflow.engines.results import slot_bytes
from vflow.exporter.tiny.scenes import samples
from vflow.exporter.tiny.trained import BENCH_KINDS

SEED = 9_000_000  # scenes that nothing was trained on
SCENES = 32
SHAPES = ((1.0, 1.0), (1.0, 0.75), (0.75, 1.0), (0.5, 0.5))  # of --side
REQUEST_SECONDS = 3600
QUEUE = 64
LEAST_SIDE = 112  # pixels: scenes have no room for their objects below


@dataclass(frozen=True)
class Load:
    """What some clients have seen: seconds of each request, of all of them together, and tokens of the answers."""

    latencies: tuple[float, ...]
    seconds: float
    tokens: int

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.latencies) / self.seconds


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that ``share`` of them do not exceed."""
    return sorted(values)[max(0, -(-int(share * 100) * len(values) // 100) - 1)]


def bodies(side: int, max_new_tokens: int) -> list[bytes]:
    """Requests about scenes of several shapes."""
    made = []
    for number in range(SCENES):
        width, height = (max(LEAST_SIDE, int(side * share)) for share in SHAPES[number % len(SHAPES)])
        kind = list(BENCH_KINDS)[number % len(BENCH_KINDS)]
        scene = next(samples(seed=SEED + number, count=1, kinds=[kind], width=width, height=height))
        file = io.BytesIO()
        Image.fromarray(scene.image).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": scene.question.prompt}]
        made.append(json.dumps({"model": "m", "max_tokens": max_new_tokens, "messages": [{"role": "user", "content": content}]}).encode())
    return made


@contextmanager
def server(path: str, kv_memory: int, threads: int | None) -> Iterator[tuple[str, int]]:
    """A server process: its address and how many slots it has."""
    options = ["--port", "0", "--name", "m", "--kv-memory", str(kv_memory), "--queue-limit", str(QUEUE), "--timeout", str(REQUEST_SECONDS)]
    options += ["--threads", str(threads)] if threads else []
    code = "from vflow.exporter.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, "serve", path, *options], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        ready = re.match(r"ready at (\S+): (\d+) slots", line)
        if ready is None:
            raise SystemExit(line + process.stderr.read())
        yield ready[1], int(ready[2])
    finally:
        process.terminate()
        process.communicate()


def ask(address: str, body: bytes) -> tuple[float, dict[str, Any]]:
    """Seconds until the answer, and the answer."""
    request = urllib.request.Request(f"{address}/chat/completions", body, {"Content-Type": "application/json"})
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
        answer = json.load(response)
    return time.perf_counter() - began, answer


def measure(address: str, requests: Sequence[bytes], clients: int) -> Load:
    """Send all requests, ``clients`` at a time."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda body: ask(address, body), requests))
    seconds = time.perf_counter() - began
    return Load(tuple(latency for latency, _ in answers), seconds, sum(answer["usage"]["completion_tokens"] for _, answer in answers))


def table(engines: Sequence[str], slots: dict[str, int], loads: dict[tuple[str, int], list[Load]]) -> Iterator[str]:
    """Markdown: medians of rates over rounds, percentiles over all requests, and rates beside the first engine's."""
    yield "| engine | slots | clients | requests/s | × | p50 s | p99 s | tokens/s |"
    yield "|---|---|---|---|---|---|---|---|"
    for engine in engines:
        for clients in sorted(clients for name, clients in loads if name == engine):
            rounds = loads[engine, clients]
            rate = statistics.median(load.rate for load in rounds)
            first = statistics.median(load.rate for load in loads[engines[0], clients])
            latencies = [latency for load in rounds for latency in load.latencies]
            tokens = statistics.median(load.tokens / load.seconds for load in rounds)
            yield (f"| {Path(engine).name} | {slots[engine]} | {clients} | {rate:.3g} | {rate / first:.2f} | {percentile(latencies, 0.5):.3g} "
                   f"| {percentile(latencies, 0.99):.3g} | {tokens:.3g} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+")
    parser.add_argument("--slots", type=int, default=4, help="of the first engine; their bytes are the memory of all")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=32, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=448, help="pixels of the largest scenes")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    memory = args.slots * slot_bytes(open_engine(args.engines[0], check_hashes=False))
    requests = list(islice(cycle(bodies(args.side, args.max_new_tokens)), args.requests))
    slots: dict[str, int] = {}
    loads: dict[tuple[str, int], list[Load]] = {}
    for turn in range(args.rounds):
        for engine in args.engines:
            with server(engine, memory, args.threads) as (address, slots[engine]):
                measure(address, requests[: len(SHAPES)], 1)  # pages the weights in
                for clients in args.clients:
                    loads.setdefault((engine, clients), []).append(measure(address, requests, clients))
                    said = f"round {turn + 1}: {engine}, {clients} clients: {loads[engine, clients][-1].rate:.3g} requests/s"
                    print(said, file=sys.stderr, flush=True)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, Python {platform.python_version()}, {memory / 2**20:.1f} MiB of KV caches, "
          f"{args.rounds} rounds of {args.requests} requests\n")  # fmt: skip
    print("\n".join(table(args.engines, slots, loads)))


if __name__ == "__main__":
    main()
