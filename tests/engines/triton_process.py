"""A real Triton Inference Server on loopback, from the wheel that ``make`` installs beside the test environment."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton_grpc
from vflow.engines.triton_server.interface import INPUTS

ENVIRONMENT = Path(os.environ.get("VFLOW_TRITON_SERVER") or Path(sys.prefix) / "triton-server")
PATIENCE = 30.0  # seconds that a test waits for what must happen; reached only where it is red
SLOW_TOKENS = 20_000  # that the stand-in in the model "slow" writes: seconds of decoding, so that a test can do something meanwhile
ENDLESS = "1 2 3"  # to which the stand-in goes on and on
NUMPY_TYPES = {"BOOL": np.bool_, "FP64": np.float64, "INT64": np.int64, "UINT8": np.uint8}
SPECS = {spec.name: spec for spec in INPUTS}


def why_missing() -> str | None:
    """Why there is no server here, or None if there is one."""
    stubs = list(ENVIRONMENT.glob("lib/python3.*/site-packages/pytriton/tritonserver/python_backend_stubs"))
    if not stubs:
        return f"no Triton server in {ENVIRONMENT}; `make .venv/triton-server/.ready` installs one (Linux x86-64, Python below 3.13)"
    needs = subprocess.run(["ldd", str(_stub(stubs[0]))], capture_output=True, text=True).stdout
    missing = re.findall(r"(\S+) => not found", needs)
    return f"Triton's Python backend needs {missing[0]} in the system; install it" if missing else None


def _stub(stubs: Path) -> Path:
    return stubs / stubs.parents[2].parent.name.removeprefix("python") / "triton_python_backend_stub"


def backends(folder: Path) -> Path:
    """A backend directory: the wheel's Python backend with the stub of the environment's Python beside it."""
    (server,) = ENVIRONMENT.glob("lib/python3.*/site-packages/pytriton/tritonserver")
    (folder / "python").mkdir(parents=True)
    for file in [*(server / "backends" / "python").iterdir(), _stub(server / "python_backend_stubs")]:
        if file.is_file():
            (folder / "python" / file.name).symlink_to(file)
    return folder


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Answer:
    """What came back: pieces of text, the outputs of the last response, or the error."""

    pieces: list[str] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class TritonProcess:
    """``tritonserver`` over model repositories; a context manager that leaves no process behind."""

    def __init__(self, repositories: Sequence[Path], scratch: Path, *, exit_timeout: int = 120, options: Sequence[str] = ()) -> None:
        (server,) = ENVIRONMENT.glob("lib/python3.*/site-packages/pytriton/tritonserver")
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        command = [str(server / "bin" / "tritonserver"), f"--backend-directory={scratch / 'backends'}", f"--exit-timeout-secs={exit_timeout}"]
        command += [*options, *(f"--model-repository={repository}" for repository in repositories)]
        for protocol in ("http", "grpc", "metrics"):
            command += [f"--{protocol}-address=127.0.0.1", f"--{protocol}-port={getattr(self, f'{protocol}_port')}"]
        if not (scratch / "backends").exists():
            backends(scratch / "backends")
        self.log = scratch / f"log-{self.http_port}"
        # The Python backend runs the Python that PATH shows.
        environment = {**os.environ, "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)

    def __enter__(self) -> TritonProcess:
        end = time.monotonic() + 2 * PATIENCE
        while not self.ready:
            assert self.process.poll() is None and time.monotonic() < end, f"the server did not start:\n{self.log.read_text(errors='replace')}"
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # the processes of its models as well
        self.process.wait()

    @property
    def ready(self) -> bool:
        try:
            return self.get(self.http_port, "/v2/health/ready")[0] == 200
        except OSError:
            return False

    def children(self) -> list[int]:
        """The processes of its models."""
        return [int(child) for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]

    def get(self, port: int, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """Status and text of an HTTP call; a POST where there is a body."""
        call = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body, headers=headers or {})
        try:
            with urllib.request.urlopen(call, timeout=PATIENCE) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def generate(self, model: str, **inputs: Any) -> tuple[int, dict[str, Any]]:
        """HTTP's generate endpoint: status and JSON."""
        status, text = self.get(self.http_port, f"/v2/models/{model}/generate", json.dumps(inputs).encode())
        return status, json.loads(text)

    def generate_stream(self, model: str, **inputs: Any) -> list[dict[str, Any]]:
        """HTTP's generate_stream endpoint: its events."""
        _, text = self.get(self.http_port, f"/v2/models/{model}/generate_stream", json.dumps(inputs).encode())
        return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]

    def gauge(self, name: str, model: str) -> float:
        """One of the model's gauges, from the metrics endpoint."""
        text = self.get(self.metrics_port, "/metrics")[1]
        found = re.search(rf'^vflow_{name}{{model="{model}",version="1"}} (\S+)', text, re.MULTILINE)
        assert found is not None, text
        return float(found[1])

    def wait_for_gauge(self, name: str, model: str, value: float) -> None:
        end = time.monotonic() + PATIENCE
        while self.gauge(name, model) != value:
            assert time.monotonic() < end, f"{name} of {model} is {self.gauge(name, model)}, not {value}"
            time.sleep(0.05)

    @contextmanager
    def stream(self, model: str, tensors: Sequence[Any]) -> Iterator[Iterator[Any]]:
        """Responses over a gRPC stream, as they come, up to the last one or an error; leaving the block cancels what is left."""
        responses: queue.SimpleQueue[Any] = queue.SimpleQueue()
        client = triton_grpc.InferenceServerClient(f"127.0.0.1:{self.grpc_port}")
        client.start_stream(lambda result, error: responses.put(error if error is not None else result))

        def all_of_them() -> Iterator[Any]:
            while True:
                response = responses.get(timeout=PATIENCE)
                if isinstance(response, Exception):
                    raise response
                yield response
                if response.get_response().parameters["triton_final_response"].bool_param:
                    return

        try:
            client.async_stream_infer(model, list(tensors), enable_empty_final_response=True)
            yield all_of_them()
        finally:
            client.stop_stream(cancel_requests=True)
            client.close()

    def ask(self, model: str, tensors: Sequence[Any]) -> Answer:
        """A whole answer over a gRPC stream."""
        answer = Answer()
        with self.stream(model, tensors) as responses:
            try:
                for response in responses:
                    outputs = {tensor.name: response.as_numpy(tensor.name)[0] for tensor in response.get_response().outputs}
                    answer.pieces.append(outputs.pop("text", b"").decode())
                    answer.outputs |= outputs
            except triton_grpc.InferenceServerException as error:
                answer.error = error.message()
        return answer


def tensors(module: Any = triton_grpc, **inputs: Any) -> list[Any]:
    """Inputs of the model as tritonclient's tensors, for its gRPC or its HTTP client."""
    made = []
    for name, value in inputs.items():
        dtype, shape = SPECS[name].dtype, SPECS[name].shape
        if dtype == "STRING":
            elements = value if len(shape) == 1 and shape[0] < 0 else [value]
            array = np.array([element.encode() if isinstance(element, str) else element for element in elements], np.object_)
        else:
            array = np.asarray(value if len(shape) > 1 else [value], NUMPY_TYPES[dtype])
        tensor = module.InferInput(name, array.shape, "BYTES" if dtype == "STRING" else dtype)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made
