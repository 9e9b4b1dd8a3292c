"""The program that checks a GPU, tried without one: kernels in the interpreter, tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    import gpu_check

    return gpu_check


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("check") / "result.json"
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "--device", "cpu", "--sizes", "tiny", "--output", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_every_kernel_is_checked_in_every_precision(result: dict[str, Any]) -> None:
    checked = [row["name"].split(" ")[:2] for row in result["rows"] if row["part"] == "kernel"]
    ops = {op for op, _ in checked}
    assert len(ops) == 10
    assert sorted(checked) == sorted([op, precision] for op in ops for precision in ("fp32", "fp16", "bf16"))
    assert result["passed"]


def test_times_say_what_they_are_compared_with(result: dict[str, Any]) -> None:
    timed = {row["name"].split(" ")[0]: row for row in result["rows"] if row["part"] == "time"}
    assert len(timed) == 13
    assert all(isinstance(row["eager_ms"], float) for name, row in timed.items() if name != "scoring,")
    assert {"kernels_ms", "maps_ms", "lowering_ms", "one_attention_ms"} <= timed["scoring,"].keys()
    assert all({"kernels_ms", "of_limit"} <= timed[pair].keys() for pair in ("merging,", "guidance,"))
    assert set(result["limits"]) == {"copy_gb_s", "product_tflop_s"}


def test_the_machine_and_the_date_are_recorded(result: dict[str, Any]) -> None:
    assert {"date", "device", "torch", "triton_language", "python"} <= result["machine"].keys()


def test_a_machine_without_a_gpu_is_told_so() -> None:
    run = subprocess.run([sys.executable, str(TOOLS / "gpu_check.py")], capture_output=True, text=True, check=False)
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert run.returncode == 1
    assert "no GPU" in run.stderr


@pytest.mark.parametrize(
    ("outputs", "passed"),
    [([1.0, 2.0], True), ([1.0, 2.00001], True), ([1.0, 2.1], False), ([float("nan"), 2.0], False), ([1.0], False)],
)
def test_wrong_outputs_are_noticed(gpu_check: ModuleType, outputs: list[float], passed: bool) -> None:
    from gpu_cases import Case
    from vflow.plugins.selection_kernels import KEEP_TOP

    case = Case(KEEP_TOP, [], {}, list, lambda: None, (1e-4,))
    wanted = torch.tensor([1.0, 2.0], dtype=torch.float64)
    if len(outputs) != len(wanted):
        assert gpu_check.compare(case, [torch.tensor(outputs)], [wanted[:1].repeat(1, 1)])["passed"] is False
    else:
        assert gpu_check.compare(case, [torch.tensor(outputs)], [wanted])["passed"] is passed


def test_integers_must_match_bit_for_bit(gpu_check: ModuleType) -> None:
    from gpu_cases import Case
    from vflow.plugins.selection_kernels import KEEP_TOP

    case = Case(KEEP_TOP, [], {}, list, lambda: None, (0.0,))
    assert gpu_check.compare(case, [torch.tensor([3, 4])], [torch.tensor([3, 5])]) == {"passed": False, "errors": [1]}


def test_a_check_that_raises_fails_alone(gpu_check: ModuleType) -> None:
    report = gpu_check.Report()
    report.add("kernel", "broken", lambda: 1 // 0)
    report.add("kernel", "fine", lambda: {"passed": True})
    assert [row["passed"] for row in report.rows] == [False, True]
    assert "ZeroDivisionError" in report.rows[0]["error"]
    assert not report.passed


@pytest.mark.slow
def test_whole_engines_are_checked_and_timed_pruned_beside_unpruned(tmp_path: Path) -> None:
    """On ONNX Runtime and a CPU, with the small model: the program, not the figures."""
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "--device", "cpu", "--parts", "models", "speed", "--shape", "tiny", "--sides", "6", "8"]
    run = subprocess.run([*command, "--output", str(tmp_path / "result.json")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "result.json").read_text())["rows"]}
    for model in ("tiny", "tiny-2.5", "tiny-3"):
        assert all(rows[f"{model}, onnxruntime CPU {name}"]["passed"] for name in ("unpruned", "progressive", "tower", "merged"))
    pruned = rows["tiny, onnxruntime CPU tower 64 tokens"]
    assert pruned["visual_tokens"] == 64 and pruned["kept"][-1] < 64
    assert pruned["kv_saved"] > 0.85 and pruned["times_faster"] > 0
    assert "3.8 times" in pruned["beside"]


def test_runtimes_that_are_missing_are_listed_with_the_reason(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_models

    monkeypatch.setattr(gpu_models.util, "find_spec", lambda name: None)
    reasons = {runtime[0]: reason for runtime, reason in gpu_models.available_runtimes("cuda")}
    assert reasons["tensorrt-rtx"] == "tensorrt_rtx and polygraphy and cuda missing"
    assert set(reasons) == {"onnxruntime CUDA", "tensorrt-rtx", "tensorrt"}
    assert [runtime[0] for runtime, reason in gpu_models.available_runtimes("cpu") if not reason] == ["onnxruntime CPU"]


@pytest.mark.parametrize(("capability", "runs"), [((8, 9), True), ((9, 0), False)])
def test_a_gpu_that_tensorrt_rtx_does_not_know_is_said(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    import gpu_models
    import tensorrt_rtx

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    reason = gpu_models.unsupported_gpu(tensorrt_rtx)
    assert reason == "" if runs else reason.endswith("does not support GPUs of compute capability 9.0")
