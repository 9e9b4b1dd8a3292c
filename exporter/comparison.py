"""Tensors of one run beside those of another, through Polygraphy's comparators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.errors import EngineError
from .models import PROTECTED

__all__ = ["Difference", "compare"]

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Difference:
    """The largest difference between two tensors of one name, what was allowed beside the largest value, and the verdict.

    ``worst`` is infinite where the shapes differ.
    """

    name: str
    worst: float
    allowed: float
    passed: bool


def compare(ours: Tensors, reference: Tensors, share: float) -> list[Difference]:
    """Every tensor of the reference against ours.

    Args:
        share: what an element may differ by, of its own value or of the largest in its tensor, whichever is more; whole numbers and truth values
            may not differ at all. What marks a protected token, and infinity, is not a value that others are measured by.

    Raises:
        EngineError: Polygraphy is missing.
    """
    try:
        from polygraphy.comparator import IterationResult, SimpleCompareFunc
        from polygraphy.logger import G_LOGGER
    except ImportError:
        raise EngineError("polygraphy is missing; pip install 'polygraphy>=0.53.6'") from None
    allowed = {name: share * _scale(values) if values.dtype.kind == "f" else 0.0 for name, values in reference.items()}
    relative = {name: share if values.dtype.kind == "f" else 0.0 for name, values in reference.items()}
    function = SimpleCompareFunc(atol=allowed, rtol=relative, infinities_compare_equal=True)
    found = []
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(invalid="ignore", divide="ignore"):
        for name, expected in reference.items():
            actual = ours[name]
            if actual.shape != expected.shape:
                found.append(Difference(name, float("inf"), allowed[name], False))
            elif not expected.size:
                found.append(Difference(name, 0.0, allowed[name], True))
            else:
                pair = (IterationResult({name: values}, runner_name=side) for side, values in (("ours", actual), ("reference", expected)))
                result = function(*pair)[name]
                found.append(Difference(name, float(result.max_absdiff), allowed[name], bool(result)))
    return found


def _scale(values: NDArray[Any]) -> float:
    """The largest magnitude among ordinary numbers."""
    magnitudes = np.abs(values.astype(np.float64))
    return float(magnitudes[magnitudes < PROTECTED].max(initial=0.0))
