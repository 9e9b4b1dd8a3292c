"""Kernels compiled once for all tests, and what the tests of the kernels print when all is done."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_errors import worst
from kernel_graph import kernel_graph
from vflow.plugins.contract import PRECISIONS

KERNEL_TESTS = [
    "test_kernels_scoring.py",
    "test_kernels_compaction.py",
    "test_torch_ops.py",
    "test_compile.py",
    "test_emulated_kernels.py",
    "test_lowerings.py",
]
collect_ignore = [] if importlib.util.find_spec("triton") else KERNEL_TESTS  # there is no Triton language for macOS

COMPILE = """
import sys
from pathlib import Path
import onnx
from vflow.plugins.compile import Kernel, compile_plugins, graph_kernels
from vflow.plugins.entropy_kernels import PATCH_ENTROPY
folder, precision = sys.argv[1:]
compile_plugins(Path(folder), graph_kernels([onnx.load_model_from_string(sys.stdin.buffer.read())], precision))
compile_plugins(Path(folder + "-entropy"), [Kernel(PATCH_ENTROPY, {"K": 1176}, precision)])  # the one that no graph holds
"""


@pytest.fixture(scope="session")
def compiler_environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """For processes that compile kernels, since this one interprets them."""
    cache = Path(request.config.cache.mkdir("kernels"))  # type: ignore[union-attr]
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory, compiler_environment: dict[str, str]) -> dict[str, Path]:
    """Folders with all kernels of ``kernel_graph`` for all targets, by precision. A process each: this one may hold interpreted kernels."""
    folders = {precision: tmp_path_factory.mktemp(precision) for precision in PRECISIONS}
    processes = {
        precision: subprocess.Popen(
            [sys.executable, "-c", COMPILE, str(folder), precision], env=compiler_environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for precision, folder in folders.items()
    }
    for precision, process in processes.items():
        assert process.stdin is not None
        process.stdin.write(kernel_graph(precision).SerializeToString())
        process.stdin.close()
    for precision, process in processes.items():
        assert process.stderr is not None
        errors = process.stderr.read().decode()
        assert process.wait() == 0, f"{precision}: {errors}"
    return folders


@pytest.fixture(scope="session")
def compiled_entropy(compiled: dict[str, Path]) -> dict[str, Path]:
    """Folders with the one kernel that no graph holds, by precision."""
    return {precision: folder.with_name(f"{folder.name}-entropy") for precision, folder in compiled.items()}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if worst:
        terminalreporter.section("worst relative error of each kernel against float64 (interpreter)")
        for op, error in sorted(worst.items()):
            terminalreporter.write_line(f"{op:<32} {error:.1e}")
