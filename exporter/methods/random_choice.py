"""Control: tokens drawn by chance, every one as likely as any other. Evaluation only.

Independent comparisons (UniPruneBench, arXiv 2511.02650) find it ahead of several published methods, so what does not beat it has not chosen.
The draw is seeded by the picture's pixels and therefore repeatable: the same picture at the same precision keeps the same tokens whatever the order
of evaluation, and a smaller budget keeps some of those that a larger one does. At budget keep: one stage before the decoder with that keep.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..models import TowerState, VisionGraph
from .base import Method, single_stage

__all__ = ["RANDOM", "RandomVision"]

PIXEL_STEPS = 1000  # a normalised pixel is counted in whole thousandths: their sum is exact in whatever order it is formed


class RandomVision(VisionGraph):
    """Importance is a uniform draw, made before block 0 and left alone since."""

    def begin(self, pixel_values: Tensor, entropy: Tensor | None, budget: int) -> TowerState:
        state = super().begin(pixel_values, entropy, budget)
        seed = int((pixel_values.double() * PIXEL_STEPS).round().long().sum())
        draw = torch.rand(state.rows * state.columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        return replace(state, importance=draw.to(state.importance.device))

    def score(self, query: Tensor, key: Tensor, state: TowerState) -> Tensor:
        return state.importance


RANDOM = Method("random", single_stage, vision=RandomVision, scores_attention=False)
