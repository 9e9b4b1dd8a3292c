"""How much faster arithmetic allows a schedule to be than another one, part by part (``exporter/budget.py``)."""

from __future__ import annotations

from dataclasses import dataclass

from ..budget import cost, traffic
from ..schedule import Schedule
from ..shape import ModelShape

__all__ = ["Limits", "limits"]


@dataclass(frozen=True)
class Limits:
    """Ratios of operations and of bytes moved, the other schedule's over this one's.

    Attributes:
        vision_flops, vision_bytes: tower and merger; scoring counts among the operations.
        prefill_flops, prefill_bytes: decoder. first_token_flops: both. step_bytes: a token after the first, which moves much and computes little.
    """

    vision_flops: float
    vision_bytes: float
    prefill_flops: float
    prefill_bytes: float
    first_token_flops: float
    step_bytes: float


def limits(schedule: Schedule, other: Schedule, shape: ModelShape, *, side: int, text_tokens: int, bytes_per_value: int) -> Limits:
    """Of one image of ``side`` × ``side`` visual tokens; ``other`` is the yardstick."""
    flops, other_flops = (cost(s, shape, rows=side, columns=side, text_tokens=text_tokens) for s in (schedule, other))
    moved, other_moved = (
        traffic(s, shape, rows=side, columns=side, text_tokens=text_tokens, bytes_per_value=bytes_per_value) for s in (schedule, other)
    )
    return Limits(
        vision_flops=(other_flops.tower_flops + other_flops.scoring_flops) / (flops.tower_flops + flops.scoring_flops),
        vision_bytes=other_moved.tower / moved.tower,
        prefill_flops=other_flops.decoder_flops / flops.decoder_flops,
        prefill_bytes=other_moved.decoder / moved.decoder,
        first_token_flops=other_flops.flops / flops.flops,
        step_bytes=other_moved.step / moved.step,
    )
