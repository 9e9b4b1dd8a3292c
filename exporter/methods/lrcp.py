"""LRCP (arXiv 2605.15621): keep the visual tokens that the picture's low-rank background explains worst. Evaluation only (a decomposition).

The visual tokens of a picture lie near a subspace of few dimensions, which principal component analysis finds; a token's score is the length of what
is left of it outside that subspace. Not on the paper's public pages, and chosen: tokens are centred and not scaled, and the subspace has as few
dimensions as hold ``BACKGROUND`` of the variance. At budget keep: one stage before the decoder, over the merged visual tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plugins.compaction import keep_top
from ..models import Compacted, TowerState, VisionGraph
from ..schedule import Stage, keep_count
from .base import Method, single_stage

__all__ = ["LRCP", "LrcpVision", "background_residual"]

BACKGROUND = 0.9  # of the variance; the rest is what tokens differ by


class LrcpVision(VisionGraph):
    """Survivors are those with the largest residual."""

    def compact(self, stage: Stage, features: Tensor, state: TowerState, final: bool = False) -> Compacted:
        kept = keep_top(background_residual(state.own(features)), keep_count(state.budget, stage.keep))
        return Compacted(features[kept], state.importance[kept], kept)


def background_residual(features: Tensor) -> Tensor:
    """Length of each token outside the dominant subspace of all: [N, H] → float32 [N]."""
    centred = features.float() - features.float().mean(0)
    left, strength, _ = torch.linalg.svd(centred, full_matrices=False)  # [N, K], [K]
    energy = strength.square()
    before = energy.cumsum(0) - energy  # of the components ahead of each
    outside = before >= BACKGROUND * energy.sum()  # bool [K]
    residual: Tensor = ((left * strength).square() * outside).sum(1).sqrt()
    return residual


LRCP = Method("lrcp", single_stage, vision=LrcpVision, scores_attention=False)
