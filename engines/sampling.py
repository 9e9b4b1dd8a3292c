"""The next token from logits: greedy, or sampled with temperature, top-k and top-p (in this order, as in Hugging Face)."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import EngineError

__all__ = ["SamplingParams", "next_token"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: only the k most probable tokens; 0 is all.
        top_p: only the fewest most probable tokens whose probabilities sum to this, in (0, 1].
        seed: of the random numbers; None takes a new one every time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or self.temperature < 0:
            raise EngineError(f"temperature must be a number from 0 (greedy), got {self.temperature!r}")
        if not is_whole(self.top_k) or self.top_k < 0:
            raise EngineError(f"top_k must be a whole number from 0 (all tokens), got {self.top_k!r}")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise EngineError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if self.seed is not None and (not is_whole(self.seed) or self.seed < 0):
            raise EngineError(f"seed must be a whole number from 0, got {self.seed!r}")


def next_token(logits: NDArray[np.float32], params: SamplingParams, generator: np.random.Generator) -> int:
    """Choose a token id.

    Args:
        logits: float32 [vocab_size]; −inf excludes a token.
        generator: consumed only when sampling.

    Raises:
        EngineError: logits that hold NaN or +inf, or nothing else than −inf.
    """
    best = int(np.argmax(logits))  # the lowest index among equals, and the first NaN if there is one
    if not np.isfinite(logits[best]):
        raise EngineError("the model's logits are not finite (fp16 overflow?); build the engine with --precision fp32")
    if params.temperature == 0:
        return best
    with np.errstate(over="ignore"):  # to −inf, probability 0: what a tiny temperature means
        scaled = (logits.astype(np.float64) - float(logits[best])) / params.temperature  # [V], largest is 0
    order = np.argsort(-scaled, kind="stable")  # [V], most probable first
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp(scaled[order])
    probabilities = weights / weights.sum()
    before = np.cumsum(probabilities) - probabilities  # mass of the tokens ranked above
    probabilities = np.where(before < params.top_p, probabilities, 0.0)  # the first always stays: 0 is less than top_p
    return int(generator.choice(order, p=probabilities / probabilities.sum()))


def is_number(value: object) -> bool:
    """A finite number, Python's or NumPy's."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # a whole number larger than any float
        return False


def is_whole(value: object) -> bool:
    """A whole number, Python's or NumPy's."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
