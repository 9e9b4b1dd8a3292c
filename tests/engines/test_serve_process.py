"""``vflow-export serve`` as a process: ready, stopped by signals amid requests, killed and started anew."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from click.testing import CliRunner
from serving import MODEL, PATIENCE, client, user, wait_until
from vflow.engines import Engine, Session, open_engine
from vflow.exporter.cli import main

# The stand-in answers within milliseconds: each step takes longer here, so that there is something to interrupt.
SLOWED = """
import sys, time
from vflow.engines.backends.onnxruntime import OnnxRuntimeBackend
language, seconds = OnnxRuntimeBackend.language, float(sys.argv.pop(1))
def slowly(self, **feed):
    time.sleep(seconds)
    return language(self, **feed)
OnnxRuntimeBackend.language = slowly
from vflow.exporter.cli import main
main()
"""


class Server:
    """A process that serves, and its address once it is ready."""

    def __init__(self, engine: Path, *options: str, step: float = 0.02) -> None:
        command = [sys.executable, "-c", SLOWED, str(step), "serve", str(engine), "--threads", "1", "--provider", "cpu", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        ready = re.search(r"ready at (http://[\d.:]+)/v1: (\d+) slots, [\d.]+ MiB", line)
        assert ready, line + self.process.stderr.read()
        self.address, self.slots = ready[1], int(ready[2])

    def end(self) -> tuple[int, str]:
        """Exit code and what it said."""
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said


@pytest.fixture
def start(standin: Engine) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*options: str, **more: Any) -> Server:
        servers.append(Server(standin.path, "--port", "0", *options, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.communicate()


def ask(address: str, **options: Any) -> Any:
    return client(address).chat.completions.create(model=MODEL, messages=[user("hello")], max_tokens=40, **options)


def streams(address: str, begun: threading.Semaphore) -> str:
    chunks = []
    for chunk in ask(address, stream=True):
        chunks.append(chunk.choices[0].delta.content or "")
        begun.release()
    return "".join(chunks)


def test_sigterm_amid_requests_answers_those_that_were_taken_and_no_more(start: Callable[..., Server], standin: Engine) -> None:
    server = start("--slots", "2", "--queue-limit", "4", step=0.05)
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(8) as pool:
        streamed = [pool.submit(streams, server.address, begun) for _ in range(2)]
        for _ in range(6):
            assert begun.acquire(timeout=PATIENCE)
        whole = [pool.submit(ask, server.address) for _ in range(2)]
        metrics = f"{server.address}/metrics"
        wait_until(lambda: "vflow_requests_queued 2.0" in httpx.get(metrics).text)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{server.address}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="no more requests are taken"):
            ask(server.address)
        expected = Session(standin, provider="cpu", threads=1).generate("hello", max_new_tokens=40).text
        assert {answer.result(PATIENCE) for answer in streamed} == {expected}
        assert {answer.result(PATIENCE).choices[0].message.content for answer in whole} == {expected}
    assert server.end() == (0, "stopped\n")


def test_when_the_time_to_drain_is_over_the_rest_hears_of_it(start: Callable[..., Server]) -> None:
    server, begun = start("--slots", "1", "--drain", "0.2", step=0.1), threading.Semaphore(0)
    with ThreadPoolExecutor(2) as pool:
        streamed = pool.submit(streams, server.address, begun)
        assert begun.acquire(timeout=PATIENCE)
        waiting = pool.submit(ask, server.address)
        wait_until(lambda: "vflow_requests_queued 1.0" in httpx.get(f"{server.address}/metrics").text)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shut down before the answer had ended"):
            streamed.result(PATIENCE)
        with pytest.raises(openai.InternalServerError, match="shut down before the answer had ended") as caught:
            waiting.result(PATIENCE)
        assert caught.value.status_code == 503
    assert server.end() == (0, "stopped\n")


def test_a_second_signal_does_not_wait(start: Callable[..., Server]) -> None:
    server, begun = start("--slots", "1", "--drain", "1000", step=0.1), threading.Semaphore(0)
    with ThreadPoolExecutor(1) as pool:
        streamed = pool.submit(streams, server.address, begun)
        assert begun.acquire(timeout=PATIENCE)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{server.address}/health").status_code == 503)
        server.process.send_signal(signal.SIGTERM)
        code, said = server.end()
        assert isinstance(streamed.exception(PATIENCE), (openai.APIError, httpx.TransportError))
    assert code == 0 and said.endswith("stopped\n")


def test_a_server_that_was_killed_starts_again_on_the_same_port(start: Callable[..., Server], standin: Engine) -> None:
    server, begun = start(), threading.Semaphore(0)
    before = ask(server.address).choices[0].message.content
    with ThreadPoolExecutor(1) as pool:
        streamed = pool.submit(streams, server.address, begun)
        assert begun.acquire(timeout=PATIENCE)
        os.kill(server.process.pid, signal.SIGKILL)
        assert isinstance(streamed.exception(PATIENCE), (openai.APIError, httpx.TransportError))
    server.process.wait(PATIENCE)
    again = start("--port", server.address.rsplit(":", 1)[1])
    assert again.address == server.address and ask(again.address).choices[0].message.content == before
    assert open_engine(standin.path)  # its files are as they were


def test_memory_and_name_are_options(start: Callable[..., Server]) -> None:
    server = start("--kv-memory", "1MiB", "--name", "mine", "--api-key", "k")
    assert server.slots == 2**20 // (2 * 2 * 8 * 4 * (180 + 180 + 170))
    assert [model.id for model in client(server.address, api_key="k").models.list()] == ["mine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-memory", "10B"], "kv_memory of 10 bytes holds no request"),
        (["--kv-memory", "much"], "'much' is not a size; write it as 64MiB"),
        (["--slots", "2", "--kv-memory", "1GiB"], "slots and kv_memory say the same: give one of them"),
        (["--api-key", "ü"], "the API key must be printable ASCII"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1 port 0"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(standin: Engine, options: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["serve", str(standin.path), "--port", "0", *options])
    assert (result.exit_code, result.output.count("\n")) == (1, 1) and message in result.output


def test_a_port_in_use_is_said(standin: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(main, ["serve", str(standin.path), "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 1 and "choose another --host or --port" in result.output


def test_missing_packages_are_said_with_what_to_install(standin: Engine) -> None:
    script = f"import sys; sys.modules['uvicorn'] = None; from vflow.exporter.cli import main; main(['serve', {str(standin.path)!r}])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "Error: uvicorn is missing; pip install 'vflow-export[serve]'\n")
