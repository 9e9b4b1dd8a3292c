"""EvoPrune (arXiv 2603.03681): inside the tower, block by block, merge tokens by similarity, diversity and attention. Evaluation only.

Before each block of a run a few tokens are taken out. A token stays for the attention that it receives and for being unlike the picture as a whole
(diversity: 1 − mean cosine to all tokens); it goes for being like one that receives more (similarity: largest cosine to those). What goes is merged
into the survivor most like it, by a mean weighted with the attention received.

Not on the paper's public pages, and chosen: the three are brought to mean 0 and deviation 1 and count alike; cosines are those of hidden states, a
token's patches as one vector; similarity looks only at tokens with more attention, so that of two equal ones the attended one stays; the run starts
at a third of the depth, not before block 2 (docs/algorithm.md, section 4) and in a tower with windows behind a block that looks at the whole image,
and skips no block. At budget keep: token numbers fall geometrically and reach keep before the last block, so that last block, merger and decoder see
exactly the budget.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...plugins.compaction import keep_top, merge_by_slot
from ..budget import spend_keep
from ..models import Compacted, TowerState, VisionGraph
from ..schedule import KEEP_UNIT, Schedule, ScheduleError, Stage, keep_count
from ..shape import ModelShape
from .base import Method

__all__ = ["EVOPRUNE", "EvoPruneVision", "token_value"]

FIRST_BLOCK = 2  # the earliest stage
DEPTH_PARTS = 3  # the run starts after one of them
LEAST_DEVIATION = 1e-4  # of a criterion that counts: below it differences are rounding


class EvoPruneVision(VisionGraph):
    """Each tower stage keeps the most valuable tokens and merges the others into them."""

    def compact(self, stage: Stage, features: Tensor, state: TowerState, final: bool = False) -> Compacted:
        direction = F.normalize(state.own(features).float(), dim=1)
        cosine = direction @ direction.T  # [alive, alive]
        kept = keep_top(token_value(state.importance, cosine), keep_count(state.budget, stage.keep))
        slot = cosine[:, kept].argmax(1)
        slot[kept] = torch.arange(kept.shape[0], device=kept.device)
        merged = merge_by_slot(features, state.importance, kept, slot)
        return Compacted(merged, state.importance[kept], kept)


def token_value(attention: Tensor, cosine: Tensor) -> Tensor:
    """Attention and diversity less similarity: float32 [alive] from attention received [alive] and cosines [alive, alive]."""
    order = torch.sort(attention, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    similarity = cosine.masked_fill(rank[None, :] >= rank[:, None], 0.0).amax(1)  # of the first: like none
    return _standard(attention / attention.mean()) + _standard(1 - cosine.mean(1)) - _standard(similarity)


def _standard(values: Tensor) -> Tensor:
    """Mean 0, deviation 1; about 0 where all are equal."""
    centred = values - values.mean()
    return centred / centred.square().mean().sqrt().clamp(min=LEAST_DEVIATION)


def _schedule(shape: ModelShape, keep: float) -> Schedule:
    if keep == 1:
        return Schedule()
    blocks = shape.tower.blocks
    start = max(FIRST_BLOCK, blocks // DEPTH_PARTS, *[block + 1 for block in shape.tower.full_blocks[:1]])
    if start >= blocks:
        raise ScheduleError(f"evoprune prunes from tower block {start} on: this model's tower has {blocks} blocks; take a deeper one")
    (last,) = spend_keep(shape.decoder.layers, keep, (0,), lambda number, least, most: most)
    steps = blocks - start
    keeps = [max(last, round(KEEP_UNIT * (last / KEEP_UNIT) ** (step / steps))) for step in range(1, steps + 1)]
    return Schedule(stages=tuple(Stage("tower", block, kept) for block, kept in zip(range(start, blocks), keeps, strict=True)))


EVOPRUNE = Method("evoprune", _schedule, vision=EvoPruneVision)
