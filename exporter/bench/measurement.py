"""What is asked of everything that is timed, and what it answers; medians and spreads of several answers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["WARM_UP", "Request", "Subject", "Timing", "median", "peak_memory_bytes", "random_image", "spread"]

PROMPT = "list the objects from left to right ."
PROCESS_STATUS = "/proc/self/status"


@dataclass(frozen=True)
class Request:
    """A square random image of ``side`` pixels, a fixed question, and an answer of exactly ``new_tokens`` tokens, stop tokens or not."""

    side: int
    new_tokens: int
    prompt: str = PROMPT


WARM_UP = Request(side=224, new_tokens=2)  # pages the weights in, allocates and compiles what is allocated and compiled once


@dataclass(frozen=True)
class Timing:
    """One answer.

    Attributes:
        vision_s: preprocessing, vision tower and merger; None where there is no tower (and no image), or no telling.
        prefill_s: language model up to the prompt's last logits; sampling_s: from there to the first token; None where there is no telling.
        first_token_s: from the call to the first token; decode_s: from there to the last token.
        new_tokens: of the answer, the first included.
        visual_tokens: of the image, then survivors stage by stage; text_tokens: the rest of the prompt.
        kv_bytes: in use after the answer, None where it cannot be read.
        peak_memory_bytes: most resident memory of the process so far, loading included; None where the system does not say.
    """

    vision_s: float | None
    prefill_s: float | None
    sampling_s: float | None
    first_token_s: float
    decode_s: float
    new_tokens: int
    visual_tokens: tuple[int, ...]
    text_tokens: int
    kv_bytes: int | None
    peak_memory_bytes: int | None

    @property
    def answer_s(self) -> float | None:
        """Seconds to the first token of an answer about the image; None where there is no tower and so no image."""
        return None if self.vision_s is None and self.prefill_s is not None else self.first_token_s

    @property
    def step_s(self) -> float:
        """Seconds a token after the first."""
        return self.decode_s / max(1, self.new_tokens - 1)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Timing:
        """From ``to_dict``."""
        return cls(**{**values, "visual_tokens": tuple(values["visual_tokens"])})


class Subject(Protocol):
    """Something loaded that answers requests; ``versions`` of what computes."""

    versions: dict[str, str]

    def measure(self, request: Request) -> Timing:
        """Answer a request and say what it took."""


def random_image(side: int) -> NDArray[np.uint8]:
    """Noise, the same for everybody: uint8 [side, side, 3]."""
    return np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)


def peak_memory_bytes() -> int | None:
    """Most resident memory that this process has had (mapped files count as far as they were resident); None where only other systems than Linux
    know."""
    try:
        with open(PROCESS_STATUS, encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")), None)
    except OSError:
        return None


def median(timings: Sequence[Timing], quantity: Callable[[Timing], float | None]) -> float | None:
    """Median of a quantity, None where a timing lacks it."""
    values = [quantity(timing) for timing in timings]
    return None if any(value is None for value in values) else float(statistics.median(value for value in values if value is not None))


def spread(timings: Sequence[Timing], quantity: Callable[[Timing], float]) -> tuple[float, float]:
    """Least and most of a quantity."""
    values = [quantity(timing) for timing in timings]
    return min(values), max(values)
