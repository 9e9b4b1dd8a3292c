"""PyramidDrop (arXiv 2410.17247, CVPR 2025): the decoder in four equal parts, each of which sees a share λ of the tokens of the part before.

Stages stand at 1/4, 2/4 and 3/4 of the layers and rank by the last instruction token's attention; λ = 0.5 is published, which is an average keep of
0.47. The paper also trains with the drop; here it is applied to a model as it is. Left open: where quarters do not fall on layers (rounded down
here), and how attention is normalised (as in ``fastv``, over the visual tokens alone).

At budget keep: λ is solved for the average keep over layers. The first quarter is whole, so a quarter and a little is the least it can meet.
Exportable.
"""

from __future__ import annotations

from ..schedule import Schedule
from ..shape import ModelShape
from .base import Method
from .fastv import last_token_schedule

__all__ = ["PYRAMIDDROP"]

PARTS = 4
HALVINGS = 40  # of the interval in which λ lies: far below 1/1024


def _schedule(shape: ModelShape, keep: float) -> Schedule:
    if keep == 1:
        return Schedule()
    layers = shape.decoder.layers
    starts = sorted({layers * part // PARTS for part in range(1, PARTS)} - {0}) or [layers]
    share = _share(layers, keep, starts)
    return last_token_schedule("pyramiddrop", layers, keep, starts, lambda number: share**number)


def _share(layers: int, keep: float, starts: list[int]) -> float:
    """λ at which the parts' keeps 1, λ, λ², … average to ``keep``; 0 where the first part alone is more."""
    lengths = [end - start for start, end in zip([0, *starts], [*starts, layers], strict=True)]
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        average = sum(length * middle**number for number, length in enumerate(lengths)) / layers
        low, high = (middle, high) if average <= keep else (low, middle)
    return low


PYRAMIDDROP = Method("pyramiddrop", _schedule, scores_attention=False)
