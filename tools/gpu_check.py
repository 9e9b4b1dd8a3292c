"""Checks and times every kernel, and whole engines, on the GPU of this machine. No network, a few minutes, but for the last part:

    python tools/gpu_check.py --output gpu_check.json

Needs PyTorch with CUDA and the Triton language; cuda-python, TensorRT and TensorRT-RTX are used where they are installed. Six parts:
kernels against float64; every compiled PTX and cubin through the driver API by its contract, against the same; times beside plain PyTorch,
torch.compile and the limits of the machine as measured in the same run; engines with the ops, where one can be built; models: the small one on ONNX
Runtime CUDA, TensorRT-RTX and TensorRT against ONNX Runtime on the CPU; speed: one of ``--shape`` with random weights, pruned against unpruned.

What cannot be tried has a row that says why. The exit code is 1 if anything that ran was wrong. ``--device cpu --sizes tiny`` tries the program
itself, in the interpreter; with ``--parts models speed --shape tiny --sides 8`` the last two parts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import torch
import triton
from gpu_cases import SIZES, Case, cases
from gpu_engines import check_engine
from gpu_models import SMALL_MODELS, Runtime, available_runtimes, check_model, compare_speed, large_model, schedules, unsupported_gpu
from gpu_timing import machine_limits, pair_times, scoring_times, time_case
from make_model import SHAPES
from torch import Tensor
from vflow.exporter.checkpoint import open_checkpoint
from vflow.plugins.contract import Contract, bind
from vflow.plugins.launch import PRECISION_OF, launch

DTYPES = tuple(PRECISION_OF)
TIMED_DTYPE = torch.float16
ENGINES = ("tensorrt", "tensorrt_rtx")
PARTS = ["kernels", "driver", "times", "engines", "models", "speed"]


class Report:
    """What was found: one row an op, precision and way of running it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, part: str, name: str, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a check; whatever it raises becomes a failed row, so that the other checks still run."""
        started = time.monotonic()
        try:
            found = action()
        except Exception as error:
            found = {"passed": False, "error": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[-2000:]}
        row = {"part": part, "name": name, **found, "seconds": round(time.monotonic() - started, 2)}
        self.rows.append(row)
        details = {key: value for key, value in row.items() if key not in ("part", "name", "passed", "trace", "seconds")}
        state = {True: "ok", False: "WRONG", None: "-"}[row.get("passed")]
        print(f"{part:<8} {name:<44} {state:<6} {'  '.join(f'{k} {v}' for k, v in details.items())}", flush=True)
        return row

    @property
    def passed(self) -> bool:
        return all(row.get("passed") is not False for row in self.rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write all results there as JSON")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=["odd", "usual", "tower", "large"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all; on a CPU kernels and times")
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="7b", help="of the model that is timed")
    parser.add_argument("--sides", nargs="+", type=int, default=[46, 78], help="of the timed images, in visual tokens: 2,116 and 6,084 of them")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of the inputs; new ones each time unless given")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU that PyTorch can use; --device cpu --sizes tiny tries the program itself", file=sys.stderr)
        return 1
    device = torch.device(options.device)
    options.parts = options.parts or (["kernels", "times"] if device.type == "cpu" else PARTS)
    machine = describe_machine(device)
    print("  ".join(f"{key} {value}" for key, value in machine.items()) + f"  seed {options.seed}\n")
    report = Report()
    if "kernels" in options.parts:
        check_kernels(report, options.sizes, device, options.seed)
    if "driver" in options.parts and device.type == "cuda":
        check_driver(report, options.sizes, device, options.seed)
    limits: dict[str, float] = {}
    if "times" in options.parts:
        limits = time_everything(report, options.sizes, device, options.seed)
    if "engines" in options.parts and device.type == "cuda":
        check_engines(report, options.sizes, device, options.seed)
    if "models" in options.parts:
        check_models(report, device)
    if "speed" in options.parts:
        check_speed(report, device, options.shape, options.sides)
    wrong = [row for row in report.rows if row.get("passed") is False]
    print(f"\n{len(report.rows)} rows, {len(wrong)} wrong" + "".join(f"\n  {row['part']} {row['name']}" for row in wrong))
    if options.output:
        result = {"machine": machine, "seed": options.seed, "limits": limits, "passed": report.passed, "rows": report.rows}
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if report.passed else 1


def describe_machine(device: torch.device) -> dict[str, str]:
    """Hardware, versions and date: what a figure in docs/benchmarks.md must say."""
    machine = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton_language": triton.__version__,
        "device": "CPU, interpreter",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}", "cuda": str(torch.version.cuda)}
    return machine


def named(case: Case, dtype: torch.dtype) -> str:
    return f"{case.spec.op} {PRECISION_OF[dtype]} " + " ".join(f"{name}={size}" for name, size in case.sizes.items())


def compare(case: Case, outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, Any]:
    """Worst relative error of each output, and whether all are within their tolerances."""
    errors, passed = [], len(outputs) == len(expected)
    for actual, wanted, tolerance in zip(outputs, expected, case.tolerances, strict=True):
        actual, wanted = actual.cpu(), wanted.cpu()
        passed &= actual.shape == wanted.shape
        if tolerance == 0:
            errors.append(int((actual != wanted).sum()))  # elements that differ
        else:
            difference = (actual.double() - wanted.double()).abs() / wanted.double().abs().clamp(min=case.floor)
            errors.append(float(difference.max()) if difference.numel() else 0.0)
        passed &= errors[-1] <= tolerance  # NaN fails
    return {"passed": bool(passed), "errors": [error if isinstance(error, int) else float(f"{error:.2e}") for error in errors]}


def run_kernel(case: Case) -> list[Tensor]:
    optional = [None] * (len(case.spec.inputs) - len(case.inputs))
    return launch(case.spec, [*case.inputs, *optional], **case.attributes)


def check_kernels(report: Report, sizes: Sequence[str], device: torch.device, seed: int) -> None:
    """Part 1: through PyTorch and the just-in-time compiler; twice, since results must repeat bit for bit."""
    for name in sizes:
        for dtype in DTYPES:
            for case in cases(SIZES[name], dtype, device, seed):
                report.add("kernel", named(case, dtype), lambda case=case: _check_twice(case))  # type: ignore[misc]


def _check_twice(case: Case) -> dict[str, Any]:
    first, second = run_kernel(case), run_kernel(case)
    found = compare(case, first, case.expected())
    repeats = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return found if repeats else {**found, "passed": False, "error": "two runs differ"}


def check_driver(report: Report, sizes: Sequence[str], device: torch.device, seed: int) -> None:
    """Part 2: compiled ahead of time for this GPU, launched by the contract alone; PTX and cubin."""
    major, minor = torch.cuda.get_device_capability(device)
    target = f"{major}.{minor}"
    with tempfile.TemporaryDirectory() as folder:
        for name in sizes:
            for dtype in DTYPES:
                for case in cases(SIZES[name], dtype, device, seed):
                    for assembled in (False, True):
                        label = f"{named(case, dtype)} {'cubin' if assembled else 'ptx'}"
                        report.add("driver", label, lambda c=case, d=dtype, a=assembled: _check_compiled(c, d, target, Path(folder), a))  # type: ignore[misc]


def compile_case(case: Case, precision: str, target: str, folder: Path) -> Contract:
    """The case's kernel, compiled into ``folder`` for its inputs."""
    from vflow.plugins.compile import Kernel, compile_plugins

    arguments = [argument for argument in case.spec.inputs if not argument.optional]
    values = bind(arguments, [tuple(x.shape) for x in case.inputs]) | case.attributes
    (contract,) = compile_plugins(folder, [Kernel(case.spec, values, precision)], [target])
    return contract


def _check_compiled(case: Case, dtype: torch.dtype, target: str, folder: Path, assembled: bool) -> dict[str, Any]:
    from vflow.plugins.compile import TARGETS
    from vflow.plugins.driver import DriverKernel

    if target not in TARGETS:
        return {"passed": None, "note": f"no target {target}"}
    contract = compile_case(case, PRECISION_OF[dtype], target, folder)
    stream = torch.cuda.current_stream().cuda_stream
    outputs = DriverKernel(contract, folder, assembled=assembled)(*case.inputs, stream=stream)
    torch.cuda.synchronize()
    return compare(case, outputs, case.expected())


def time_everything(report: Report, sizes: Sequence[str], device: torch.device, seed: int) -> dict[str, float]:
    """Part 3: milliseconds of kernel, plain PyTorch and torch.compile, and the share of what the machine can do."""
    limits = machine_limits(device, TIMED_DTYPE)
    print("limits   " + "  ".join(f"{name} {value:.1f}" for name, value in limits.items()))
    for name in sizes:
        timed = {case.spec.op: case for case in cases(SIZES[name], TIMED_DTYPE, device, seed)}
        for case in timed.values():
            report.add("time", named(case, TIMED_DTYPE), lambda case=case: time_case(case, lambda: run_kernel(case), limits, device))  # type: ignore[misc]
        size = SIZES[name]
        report.add("time", f"scoring, patches={size.patches}", lambda size=size: scoring_times(size, TIMED_DTYPE, device))  # type: ignore[misc]
        for title, first, second in (("merging", "GroupTokens", "MergeTokens"), ("guidance", "LastTokenLogSumExp", "LastTokenAttention")):
            pair = timed[first], timed[second]
            report.add(
                "time",
                f"{title}, tokens={size.tokens} cells={size.cells}",
                lambda a=pair[0], b=pair[1]: pair_times(lambda: run_kernel(a), lambda: run_kernel(b), b, limits, device),  # type: ignore[misc]
            )
    return limits


def check_engines(report: Report, sizes: Sequence[str], device: torch.device, seed: int) -> None:
    """Part 4: an engine of one op each, with its plugin in TensorRT and its function body in TensorRT-RTX."""
    for module in ENGINES:
        try:
            library = importlib.import_module(module)
            reason = unsupported_gpu(library)
        except (ImportError, OSError) as error:
            reason = f"not here ({error})"[:200]
        if reason:
            report.add("engine", module, lambda reason=reason: {"passed": None, "note": f"not run: {reason}"})  # type: ignore[misc]
            continue
        for case in cases(SIZES[sizes[0]], TIMED_DTYPE, device, seed):
            label = f"{module} {named(case, TIMED_DTYPE)}"
            report.add("engine", label, lambda case=case, module=module: check_engine(module, case, PRECISION_OF[TIMED_DTYPE], compare))  # type: ignore[misc]


def check_models(report: Report, device: torch.device) -> None:
    """Part 5: whole engines of the small models, one of each family, on every runtime that can be had here."""
    with tempfile.TemporaryDirectory(prefix="vflow-gpu-check-") as name:
        for runtime in _runtimes(report, "model", device):
            for model in SMALL_MODELS:
                small = open_checkpoint(model)
                for label, schedule in schedules(small).items():
                    place = Path(name) / f"{model}-{label}-{runtime[0].replace(' ', '-')}"
                    report.add("model", f"{model}, {runtime[0]} {label}", lambda m=small, r=runtime, s=schedule, p=place: check_model(m, s, r, p))  # type: ignore[misc]


def check_speed(report: Report, device: torch.device, shape: str, sides: Sequence[int]) -> None:
    """Part 6: engines of a large model on the same."""
    with tempfile.TemporaryDirectory(prefix="vflow-gpu-check-") as name:
        runtimes = _runtimes(report, "speed", device)
        large = large_model(shape, Path(name) / "checkpoint", device.type) if runtimes else None
        for runtime in runtimes:
            assert large is not None
            compare_speed(large, runtime, sides, Path(name), lambda label, action: report.add("speed", f"{shape}, {label}", action))


def _runtimes(report: Report, part: str, device: torch.device) -> list[Runtime]:
    """Those that can be tried; the others get a row that says why not."""
    found = []
    for runtime, reason in available_runtimes(device.type):
        if reason:
            report.add(part, runtime[0], lambda reason=reason: {"passed": None, "note": f"not run: {reason}"})  # type: ignore[misc]
        else:
            found.append(runtime)
    return found


if __name__ == "__main__":
    sys.exit(main())
