"""The ONNX Runtime backend: caches that stay where they are, results that are copies, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vflow.engines import Engine, EngineError, open_engine
from vflow.engines.backends import onnxruntime as backend_module
from vflow.engines.backends.onnxruntime import OnnxRuntimeBackend, check_version
from vflow.engines.positions import text_positions

MakeStandin = Callable[..., Path]
COPY_WARNING = "TensorScatter"  # ONNX Runtime warns by this name when it has to copy a cache

# Capture of file descriptor 2 is per process, so the run whose log matters has its own.
IN_PLACE_SCRIPT = """
import sys
import numpy as np
from vflow.engines import open_engine
from vflow.engines.backends import onnxruntime as module
from vflow.engines.positions import text_positions
module.LOG_SEVERITY = 2  # warnings
backend = module.OnnxRuntimeBackend(open_engine(sys.argv[1]), provider="cpu", threads=1)
if sys.argv[2] == "copying":  # what the backend must not do: other buffers for the outputs
    for name, value in backend._caches.items():
        backend._binding(0, 1).bind_output(name.replace("past_key_values", "present"), "cpu")
before = backend.cache_pointers()
for past in range(3):
    backend.language(input_ids=np.array([[7]]), position_ids=text_positions(past, 1)[:, None], visual_embeds=np.zeros((0, 16), np.float32),
                     visual_positions=np.zeros(0, np.int64), importance=np.zeros(0, np.float32), key_bias=np.zeros(0, np.float32), budget=0,
                     past_lengths=np.full((1, 2), past))
assert before == backend.cache_pointers()
print(np.abs(backend.cache_array(0, "key")).sum(axis=(0, 1, 3)).nonzero()[0].tolist())
"""


def language(backend: OnnxRuntimeBackend, tokens: list[int], past: int) -> tuple[np.ndarray, np.ndarray]:
    """A chunk of text without images: logits [vocab_size], last_hidden [hidden_size]."""
    logits, last_hidden = backend.language(
        input_ids=np.array([tokens]),
        position_ids=text_positions(past, len(tokens))[:, None],
        visual_embeds=np.zeros((0, 16), backend.dtype),
        visual_positions=np.zeros(0, np.int64),
        importance=np.zeros(0, np.float32),
        key_bias=np.zeros(0, np.float32),
        budget=0,
        past_lengths=np.full((1, 2), past, np.int64),
    )
    return logits[0], last_hidden[0]


@pytest.fixture(scope="module")
def backend(standin: Engine) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(standin, provider="cpu", threads=1)


@pytest.mark.parametrize(("binding", "filled", "warned"), [("in place", "[0, 1, 2]", False), ("copying", "[]", True)])
def test_caches_are_updated_in_place_and_the_runtime_copies_none(standin: Engine, binding: str, filled: str, warned: bool) -> None:
    done = subprocess.run([sys.executable, "-c", IN_PLACE_SCRIPT, str(standin.path), binding], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == filled
    assert (COPY_WARNING in done.stderr) == warned


def test_caches_have_the_capacity_of_their_segments(backend: OnnxRuntimeBackend, standin: Engine) -> None:
    assert [backend.cache_array(layer, "value").shape for layer in range(3)] == [(1, 2, 180, 8), (1, 2, 180, 8), (1, 2, 170, 8)]
    assert backend.cache_bytes == 2 * 2 * 8 * 4 * (180 + 180 + 170)


def test_only_the_new_columns_of_a_cache_change(backend: OnnxRuntimeBackend) -> None:
    language(backend, [10, 20, 30, 40], 0)
    before = backend.cache_array(1, "value")
    language(backend, [50, 60], 4)
    changed = np.abs(backend.cache_array(1, "value") - before).sum(axis=(0, 1, 3)).nonzero()[0]
    assert changed.tolist() == [4, 5]


def test_results_are_copies_that_later_calls_leave_alone(backend: OnnxRuntimeBackend) -> None:
    logits, last_hidden = language(backend, [10, 20, 30], 0)
    kept = logits.copy(), last_hidden.copy()
    other, _ = language(backend, [99], 3)
    assert np.abs(other - logits).max() > 0.01
    np.testing.assert_array_equal(logits, kept[0])
    np.testing.assert_array_equal(last_hidden, kept[1])


def test_clearing_fills_the_caches_with_zeros_where_they_are(backend: OnnxRuntimeBackend) -> None:
    language(backend, [10, 20, 30], 0)
    before = backend.cache_pointers()
    backend.clear_caches()
    assert backend.cache_pointers() == before and not backend.cache_array(0, "key").any()
    language(backend, [10, 20, 30], 0)
    assert backend.cache_array(0, "key").any()


def test_half_precision_graphs_get_half_precision(make_standin: MakeStandin) -> None:
    backend = OnnxRuntimeBackend(open_engine(make_standin(precision="fp16")), provider="cpu")
    embeds, importance, index, bias = backend.vision(np.ones((2, 3, 4, 96), np.float32), np.zeros((2, 3, 4), np.float32), 6)
    logits, last_hidden = language(backend, [1, 2], 0)
    assert bias is None
    assert [a.dtype for a in (embeds, importance, index, logits, last_hidden)] == ["float16", "float32", "int64", "float32", "float16"]


def test_a_smaller_budget_leaves_fewer_tokens(backend: OnnxRuntimeBackend) -> None:
    pixels = np.random.default_rng(0).normal(size=(4, 5, 4, 96)).astype(np.float32)
    full, half = (backend.vision(pixels, np.zeros((4, 5, 4), np.float32), budget) for budget in (20, 10))
    assert full[2].size == 10 and half[2].size == 5 and set(half[2]) <= set(full[2])


@pytest.mark.parametrize("version", ["1.30.2", "1.9.0", "0.99"])
def test_runtimes_that_align_attention_otherwise_are_refused(version: str) -> None:
    with pytest.raises(EngineError, match=r"onnxruntime .* may align .* answer wrongly; pip install 'onnxruntime>=1\.31'"):
        check_version(version)


@pytest.mark.parametrize("version", ["1.31.1", "1.32.0", "1.32.0.dev20261001", "1.100.1", "2.0"])
def test_later_runtimes_are_taken(version: str) -> None:
    check_version(version)


def test_a_missing_runtime_is_said_with_what_to_install(standin: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match="onnxruntime is missing; pip install"):
        OnnxRuntimeBackend(standin)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"provider": "tpu"}, "provider must be one of cpu, cuda"), ({"threads": 0}, "threads must be at least 1")],
)
def test_options_out_of_range_are_refused(standin: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        OnnxRuntimeBackend(standin, **options)


def test_cuda_is_refused_where_the_runtime_has_none() -> None:
    with pytest.raises(EngineError, match="pip install onnxruntime-gpu, or use provider 'cpu'"):
        backend_module._choose_provider("cuda", ["CPUExecutionProvider"])
    assert backend_module._choose_provider(None, ["CUDAExecutionProvider", "CPUExecutionProvider"]) == "cuda"
    assert backend_module._choose_provider(None, ["CPUExecutionProvider"]) == "cpu"


def test_nvidias_python_packages_are_looked_for_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    asked = []
    backend_module._find_cuda(SimpleNamespace(preload_dlls=lambda: (asked.append(True), print("Failed to load libcublas"))))
    backend_module._find_cuda(SimpleNamespace())  # runtimes of other makers have no such function
    assert asked == [True]
    assert capsys.readouterr().out == ""


def test_a_graph_that_is_none_is_refused_by_file(make_standin: MakeStandin) -> None:
    folder = make_standin()
    size = (folder / "language.onnx").stat().st_size
    (folder / "language.onnx").write_bytes(b"\xff" * size)
    with pytest.raises(EngineError, match=r"language\.onnx: ONNX Runtime cannot load it .*; build the engine again"):
        OnnxRuntimeBackend(open_engine(folder, check_hashes=False))


def test_a_graph_with_an_input_of_a_later_version_is_refused(make_standin: MakeStandin, edit_manifest: Callable[..., None]) -> None:
    folder = make_standin()
    edit_manifest(folder, lambda m: m["graphs"]["language"]["inputs"][0].update(name="rope_scale"))
    with pytest.raises(EngineError, match="wants input 'rope_scale', which this vflow-export does not know"):
        OnnxRuntimeBackend(open_engine(folder))
