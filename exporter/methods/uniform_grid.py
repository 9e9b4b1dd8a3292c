"""Control: tokens at evenly spaced places of the picture, whatever is on it. Evaluation only.

At budget keep: one stage before the decoder with that keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import Compacted, TowerState, VisionGraph
from ..schedule import Stage, keep_count
from .base import Method, single_stage

__all__ = ["UNIFORM_GRID", "UniformGridVision", "grid_places"]


class UniformGridVision(VisionGraph):
    """Survivors nearest to an even grid: the picture is cut into as many boxes as tokens survive, in bands of equal height."""

    def compact(self, stage: Stage, features: Tensor, state: TowerState, final: bool = False) -> Compacted:
        kept = grid_places(state.rows, state.columns, keep_count(state.budget, stage.keep)).to(features.device)
        return Compacted(features[kept], state.importance[kept], kept)


def grid_places(rows: int, columns: int, count: int) -> Tensor:
    """``count`` places spread over a grid of ``rows`` × ``columns``: int64 [count], ascending and distinct.

    Bands are as high as their boxes are wide, as nearly as whole rows allow; the places of a band lie in its middle row. There are at least so many
    bands that none must hold more places than columns, and at most one a row and one a place, so that all places differ.
    """
    square = round((count * rows / columns) ** 0.5)
    bands = min(rows, count, max(1, square, -(-count // columns)))
    number = torch.arange(count)
    band = number * bands // count
    first, end = -(-band * count // bands), -(-(band + 1) * count // bands)  # numbers of the band's places
    row = (2 * band + 1) * rows // (2 * bands)
    column = (2 * (number - first) + 1) * columns // (2 * (end - first))
    places: Tensor = row * columns + column
    return places


UNIFORM_GRID = Method("grid", single_stage, vision=UniformGridVision, scores_attention=False)
