"""Times for ``gpu_check.py``: medians over repeated calls, the machine's limits, and scoring and merging as a whole."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import Case, Sizes
from torch import Tensor
from vflow.plugins.importance import context_relevance

__all__ = ["machine_limits", "milliseconds", "pair_times", "scoring_times", "time_case"]

WARM_UPS = 3
LEAST_CALLS, MOST_CALLS, MOST_SECONDS = 5, 200, 0.5  # a timing ends with the first limit
FLUSH_BYTES = 1 << 30  # written between calls: more than any second-level cache, and long enough for the call to be queued behind it
MATRIX_SIDE = 8192
GLOBAL_THRESHOLD = 30.0  # as the published optima: a few global tokens
GLOBAL_ROWS = 35  # in 1/1024: room for P/30 of them, as graphs have


def milliseconds(action: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call with cold caches."""
    for _ in range(WARM_UPS):
        action()
    return _on_gpu(action) if device.type == "cuda" else _on_cpu(action)


def _on_cpu(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e3


def _on_gpu(action: Callable[[], Any]) -> float:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times: list[float] = []
    deadline = time.monotonic() + MOST_SECONDS
    while len(times) < LEAST_CALLS or (len(times) < MOST_CALLS and time.monotonic() < deadline):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        action()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def machine_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Copy bandwidth in GB/s (read and written) and matrix products in TFLOP/s, as measured now."""
    side, count = (MATRIX_SIDE, 1 << 29) if device.type == "cuda" else (128, 1 << 16)
    source = torch.zeros(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    left = torch.randn(side, side, device=device).to(dtype)
    copied = milliseconds(lambda: target.copy_(source), device)
    multiplied = milliseconds(lambda: left @ left, device)
    return {"copy_gb_s": 2 * count / copied / 1e6, "product_tflop_s": 2 * side**3 / multiplied / 1e9}


def time_case(case: Case, kernel: Callable[[], Any], limits: dict[str, float], device: torch.device) -> dict[str, Any]:
    """Kernel, plain PyTorch and torch.compile on one case; ``of_limit`` is the share of the copy bandwidth or of the product rate."""
    found: dict[str, Any] = {"passed": None, "kernel_ms": milliseconds(kernel, device)}
    found["eager_ms"] = _or_reason(lambda: milliseconds(lambda: case.eager(*case.inputs), device))
    if device.type == "cuda":
        compiled = torch.compile(case.eager, dynamic=False)
        found["compiled_ms"] = _or_reason(lambda: milliseconds(lambda: compiled(*case.inputs), device))
    if case.moved:
        found["of_limit"] = case.moved / found["kernel_ms"] / 1e6 / limits["copy_gb_s"]
    elif case.operations:
        found["of_limit"] = case.operations / found["kernel_ms"] / 1e9 / limits["product_tflop_s"]
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


def pair_times(first: Callable[[], Any], second: Callable[[], Any], case: Case, limits: dict[str, float], device: torch.device) -> dict[str, Any]:
    """A kernel that prepares and the one that it is for, as one, beside plain PyTorch and the bytes of ``case``, the second alone."""
    found = {"kernels_ms": milliseconds(lambda: (first(), second()), device), "eager_ms": milliseconds(lambda: case.eager(*case.inputs), device)}
    of_limit = case.moved / found["kernels_ms"] / 1e6 / limits["copy_gb_s"]
    return {"passed": None, **{name: round(value, 4) for name, value in found.items()}, "of_limit": round(of_limit, 4)}


def scoring_times(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Context relevance as a whole: kernels, the same from explicit maps, its lowering to fused attention, and one fused attention."""
    shape, scale = (sizes.heads, sizes.patches, sizes.head_dim), sizes.head_dim**-0.5
    query, key = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(dtype)

    def by_kernels() -> Tensor:
        return context_relevance(query, key, scale=scale, global_threshold=GLOBAL_THRESHOLD, global_rows=GLOBAL_ROWS)

    def from_maps() -> Tensor:
        attention = torch.softmax((query @ key.transpose(1, 2)).float() * scale, 2).mean(0)  # [P, P]
        received = attention.sum(0)
        return attention[received >= torch.minimum(received.amax(), torch.tensor(GLOBAL_THRESHOLD, device=device))].mean(0)

    def fused(width: int) -> float:
        """One fused attention over heads of this width."""
        q, k = (F.pad(x, (0, width - sizes.head_dim))[None] for x in (query, key))
        return milliseconds(lambda: F.scaled_dot_product_attention(q, k, k), device)

    found: dict[str, Any] = {"passed": None, "kernels_ms": milliseconds(by_kernels, device)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        by_kernels()
        found["kernels_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    found["maps_ms"] = _or_reason(lambda: milliseconds(from_maps, device))
    found["lowering_ms"] = _or_reason(lambda: 3 * fused(sizes.head_dim + 8))  # its three calls alone, without what is around them
    found["one_attention_ms"] = _or_reason(lambda: fused(sizes.head_dim))
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


def _or_reason(measure: Callable[[], float]) -> float | str:
    """A time, or why there is none: explicit maps need more memory than many GPUs have, and not every machine has a compiler."""
    try:
        return measure()
    except (RuntimeError, AssertionError, OSError) as error:
        return f"none ({type(error).__name__})"
