"""Worst errors of the kernels against float64, gathered by the tests and printed at the end of the run (``conftest.py``)."""

from __future__ import annotations

import numpy as np
import torch

worst: dict[str, float] = {}


def check(op: str, actual: torch.Tensor, expected: object, *, tolerance: float, floor: float = 1e-12) -> None:
    """Relative error against a float64 array, elements below ``floor`` taken as ``floor``; remembered under ``op`` and dtype."""
    wanted = np.asarray(expected, dtype=np.float64)
    assert tuple(actual.shape) == wanted.shape
    error = np.abs(actual.double().numpy() - wanted) / np.maximum(np.abs(wanted), floor)
    largest = float(error.max(initial=0.0))
    worst[op] = max(worst.get(op, 0.0), largest)
    assert largest <= tolerance, f"{op}: relative error {largest:.2e}"
