"""The command line, ``verify``, ``doctor`` and help: what it does when all is well, and one line with the right exit code when it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from cli_support import refused
from click.testing import Result
from vflow.engines import Engine


def test_verify_climbs_all_rungs(call: Callable[..., Result], engine: Engine) -> None:
    result = call("verify", engine.path, "--samples", 5, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["passed"] is True
    assert [finding["rung"] for finding in values["findings"]] == ["a", "b", "b", "b", "c", "c", "d", "d", "d"]
    assert all(set(finding) == {"rung", "quantity", "worst", "tolerance", "passed", "note"} for finding in values["findings"])
    assert values["findings"][1]["worst"] == 0.0  # no survivor differs


def test_verify_fails_an_engine_that_computes_something_else(
    call: Callable[..., Result], engine: Engine, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vflow.engines.backends.onnxruntime import OnnxRuntimeBackend
    from vflow.exporter import verify

    language = OnnxRuntimeBackend.language

    def shifted(self: OnnxRuntimeBackend, **inputs: Any) -> Any:
        logits, last_hidden = language(self, **inputs)
        return logits + 0.01, last_hidden

    monkeypatch.setattr(OnnxRuntimeBackend, "language", shifted)
    monkeypatch.setattr(verify, "build_engine", lambda *_, **__: engine)  # rung (a) then compares another engine, and fails as well
    result = call("verify", engine.path, "--image", image)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "ok" in result.stdout  # step by step is as wrong as all at once


def test_verify_looks_at_the_graphs_that_other_runtimes_get(
    call: Callable[..., Result], engine: Engine, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vflow.engines.backends.onnxruntime import OnnxRuntimeBackend

    vision = OnnxRuntimeBackend.vision

    def shifted(self: OnnxRuntimeBackend, *inputs: Any) -> Any:
        image = vision(self, *inputs)
        return image._replace(importance=image.importance * np.float32(1.01 if self._standard else 1.0))

    monkeypatch.setattr(OnnxRuntimeBackend, "vision", shifted)
    values = json.loads(call("verify", engine.path, "--image", image, "--json").stdout)
    failed = [(finding["rung"], finding["quantity"]) for finding in values["findings"] if not finding["passed"]]
    assert failed == [("d", "importance of the survivors, relative")]


def test_verify_refuses_another_model(call: Callable[..., Result], engine: Engine, untied_checkpoint: Path) -> None:
    refused(call("verify", engine.path, "--model", untied_checkpoint), "is not the model of this engine")
    refused(call("verify", engine.path, "--model", "nothing"), "nothing: no such folder")


def test_doctor_finds_what_is_needed_here(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    result = call("doctor")
    assert result.exit_code == 0
    for words in ("machine", "ONNX Runtime", "build", "TensorRT", "pip install 'vflow-export["):
        assert words in result.stdout
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.0")
    result = call("doctor")
    assert result.exit_code == 1
    assert "onnxruntime 1.30.0" in result.stdout


def test_help_and_version_name_every_command(call: Callable[..., Result]) -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("build", "run", "verify", "bench", "doctor"))
    assert "0.1.0" in call("--version").stdout
