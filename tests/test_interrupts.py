"""A build that is stopped, or that finds the disk full, leaves nothing that looks like an engine."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from support import HANDLED_SIGNALS
from vflow.engines import open_engine
from vflow.exporter import build as build_module
from vflow.exporter.cli import main

PHASES = ["open checkpoint", "trace vision", "trace language", "write weights", "check sums"]
LIMITS = ["--max-visual-tokens", "64", "--max-text-tokens", "64"]


@pytest.fixture(autouse=True)
def signals_arrive() -> Iterator[None]:
    """As at a terminal: a suite started in the background has Ctrl-C ignored, one under nohup SIGHUP, and so would the builds it starts."""
    before = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    for number in HANDLED_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def small_graph(*_: Any, **__: Any) -> ir.Model:
    """Stands for a traced graph: one weight, one output. Tracing takes seconds and is not what is tested here."""
    weight = ir.Value(name="walk.language_model.norm.weight", shape=ir.Shape([32]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Identity", [weight])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "out", weight.shape, weight.type
    graph = ir.Graph([], [node.outputs[0]], nodes=[node], initializers=[weight], opset_imports={"": 24}, name="small")
    return ir.Model(graph, ir_version=11)


@pytest.fixture
def build_here(random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """The build command in this process, into ``tmp_path / "out" / "engine"``, with small graphs."""
    monkeypatch.setattr(build_module, "trace_vision", small_graph)
    monkeypatch.setattr(build_module, "trace_language", small_graph)
    handlers = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    arguments = ["build", "--model", str(random_checkpoint), "--output", str(tmp_path / "out" / "engine"), *LIMITS]
    yield lambda *options: CliRunner().invoke(main, [*arguments, *options])
    for number, handler in handlers.items():
        signal.signal(number, handler)


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def at_phase(monkeypatch: pytest.MonkeyPatch, wanted: str, action: Callable[[], None]) -> None:
    """Do something when the build reports a phase."""
    from contextlib import contextmanager

    @contextmanager
    def progress_bar() -> Iterator[Callable[[str, float], None]]:
        yield lambda phase, share: action() if phase == wanted else None

    monkeypatch.setattr("vflow.exporter.cli.progress_bar", progress_bar)


@pytest.mark.parametrize("number", HANDLED_SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_leaves_nothing(
    build_here: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, number: signal.Signals
) -> None:
    at_phase(monkeypatch, phase, lambda: signal.raise_signal(number))
    result = build_here()
    assert result.exit_code == 1
    assert result.stderr.splitlines() == ["Error: interrupted; nothing was left behind"]
    assert left_behind(tmp_path / "out") == []


@pytest.mark.parametrize("number", [number for number in HANDLED_SIGNALS if number != signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_that_is_ignored_stops_nothing(
    build_here: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """As nohup does with SIGHUP, and a shell with SIGINT of what it starts in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        at_phase(monkeypatch, "trace language", lambda: signal.raise_signal(number))
        assert build_here().exit_code == 0
    finally:
        signal.signal(number, before)
    assert left_behind(tmp_path / "out") == ["engine"]


def test_a_signal_leaves_the_old_engine_as_it_was(build_here: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_here().exit_code == 0
    manifest = (tmp_path / "out" / "engine" / "manifest.json").read_bytes()
    at_phase(monkeypatch, "check sums", lambda: signal.raise_signal(signal.SIGINT))
    assert build_here("--force").exit_code == 1
    assert left_behind(tmp_path / "out") == ["engine"]
    assert (tmp_path / "out" / "engine" / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize("file", ["weights.bin", "vision.onnx", "tokenizer.json", "schedule.json"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_in_one_line_and_nothing_is_left(
    build_here: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    copy_text_files = build_module.copy_text_files

    def on_a_full_disk(checkpoint: Any, folder: Path) -> dict[str, Any]:
        (folder / file).symlink_to("/dev/full")
        return copy_text_files(checkpoint, folder)

    monkeypatch.setattr(build_module, "copy_text_files", on_a_full_disk)
    result = build_here()
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"Error: {tmp_path}")
    assert result.stderr.splitlines()[-1].endswith("no space left on the disk; free some or choose another folder")
    assert left_behind(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("error", "message"),
    [(MemoryError(), "out of memory"), (OSError(errno.EIO, "Input/output error", "weights.bin"), "weights.bin: Input/output error")],
)
def test_other_failures_of_the_machine_are_one_line(
    build_here: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(build_module, "write_graphs", fail)
    result = build_here()
    assert result.exit_code == 1
    assert message in result.stderr.splitlines()[-1]
    assert left_behind(tmp_path / "out") == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_that_python_drops_stops_the_build_at_its_next_step(
    build_here: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loud:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)  # "Exception ignored in …"

    def traced(*_: Any, **__: Any) -> ir.Model:
        Loud()
        return small_graph()

    monkeypatch.setattr(build_module, "trace_language", traced)
    assert build_here().exit_code == 1
    assert left_behind(tmp_path / "out") == []


def start_build(checkpoint: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from vflow.exporter.cli import main; main()"
    command = [sys.executable, "-c", code, "build"]  # the handler: a suite that runs in the background ignores Ctrl-C
    command += ["--model", str(checkpoint), "--output", str(output), *LIMITS, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_processes_that_are_stopped_leave_no_engine(random_checkpoint: Path, tmp_path: Path) -> None:
    cases = {"int": ("trace vision", signal.SIGINT), "term": ("trace language", signal.SIGTERM), "kill": ("trace language", signal.SIGKILL)}
    outcomes: dict[str, tuple[int, str]] = {}

    def stop(name: str) -> None:
        phase, number = cases[name]
        process = start_build(random_checkpoint, tmp_path / name / "engine")
        assert process.stderr is not None
        seen = ""
        for line in process.stderr:
            seen += line
            if line.startswith(phase):
                process.send_signal(number)
        process.communicate()
        outcomes[name] = process.returncode, seen

    threads = [threading.Thread(target=stop, args=(name,)) for name in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("int", "term"):
        assert outcomes[name][0] == 1, outcomes[name][1]
        assert "Error: interrupted; nothing was left behind" in outcomes[name][1].splitlines()
        assert left_behind(tmp_path / name) == []
    assert outcomes["kill"][0] == -signal.SIGKILL
    assert not (tmp_path / "kill" / "engine").exists()
    assert_partials_are_refused(tmp_path / "kill")


def assert_partials_are_refused(folder: Path) -> None:
    """What nobody could clean up is not taken for an engine."""
    for partial in folder.glob(".engine*"):
        result = CliRunner().invoke(main, ["run", str(partial), "--prompt", "what ?"])
        assert result.exit_code == 1
        assert "left over by a build that was stopped; delete it" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", [(), ("--target", "tensorrt-rtx", "--precision", "fp16")], ids=["onnxruntime", "tensorrt-rtx"])
def test_builds_killed_at_ten_random_moments_leave_no_engine(random_checkpoint: Path, tmp_path: Path, target: tuple[str, ...]) -> None:
    """From its first phase on, so that no moment is spent on imports; after the rename the engine is whole, and the process may still say so."""
    if target:
        pytest.importorskip("tensorrt_rtx")
    random = np.random.default_rng(11)

    def build(name: str, share: float | None) -> float:
        """Seconds from the first phase to the end, or to the kill at that share of ``whole``."""
        process = start_build(random_checkpoint, tmp_path / name / "engine", *target)
        assert process.stderr is not None and process.stderr.readline().startswith("open checkpoint")
        began = time.monotonic()
        drain = threading.Thread(target=process.stderr.read)
        drain.start()
        if share is not None:
            time.sleep(share * whole)
            process.kill()
        process.wait()
        drain.join()
        assert process.returncode == 0 or (share is not None and process.returncode == -signal.SIGKILL)  # it may be quicker than the first one was
        return time.monotonic() - began

    whole, unfinished = build("whole", None), 0
    for number, share in enumerate(random.uniform(0, 0.9, 10)):
        build(f"killed-{number}", share)
        time.sleep(0.2)  # a process that builds an engine ends when it notices
        assert_partials_are_refused(tmp_path / f"killed-{number}")
        if (tmp_path / f"killed-{number}" / "engine").exists():
            open_engine(tmp_path / f"killed-{number}" / "engine")
        else:
            unfinished += 1
    assert unfinished >= 3
