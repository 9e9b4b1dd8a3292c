"""DivPrune (arXiv 2503.02175, CVPR 2025): the subset of visual tokens whose closest pair is farthest apart. Evaluation only (a loop over survivors).

The max–min diversity problem over cosine distances, solved greedily: the first token is the one whose nearest neighbour is farthest, then always the
one farthest from those chosen. Nothing about attention or text enters. Left open: ties, which go to the lower index. At budget keep: one stage
before the decoder, over the merged visual tokens as the language model gets them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import Compacted, TowerState, VisionGraph
from ..schedule import Stage, keep_count
from .base import Method, single_stage

__all__ = ["DIVPRUNE", "DivPruneVision", "diverse_places"]


class DivPruneVision(VisionGraph):
    """Survivors are far from each other."""

    def compact(self, stage: Stage, features: Tensor, state: TowerState, final: bool = False) -> Compacted:
        kept = diverse_places(state.own(features), keep_count(state.budget, stage.keep))
        return Compacted(features[kept], state.importance[kept], kept)


def diverse_places(features: Tensor, count: int) -> Tensor:
    """Greedy max–min subset of ``features`` [N, H] by cosine distance: int64 [count], ascending."""
    direction = F.normalize(features.float(), dim=1)
    distance = 1 - direction @ direction.T  # [N, N]
    chosen = torch.zeros(count, dtype=torch.int64, device=features.device)
    chosen[0] = distance.clone().fill_diagonal_(float("inf")).amin(1).argmax()
    nearest = distance[chosen[0]]  # [N], to those chosen so far
    for number in range(1, count):
        nearest = nearest.index_fill(0, chosen[number - 1], float("-inf"))
        chosen[number] = nearest.argmax()
        nearest = torch.minimum(nearest, distance[chosen[number]])
    return chosen.sort().values


DIVPRUNE = Method("divprune", single_stage, vision=DivPruneVision, scores_attention=False)
