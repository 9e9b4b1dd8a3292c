"""VisionZip (arXiv 2412.04467, CVPR 2025): keep the attended tokens, merge the others into a few contextual ones. Evaluation only.

Dominant tokens are those that receive most attention in the last tower block, on average over all patches, as the paper does for towers without a
class token. Of the rest, evenly spaced ones become contextual: every other token joins the one whose key is most alike (cosine), and a contextual
token is the mean of its members. Of 64 survivors 54 are dominant and 10 contextual, as published; other counts are split in proportion.

Left open for this tower, and chosen: keys are those after rotary embedding, mean over heads and over a token's patches; merging happens behind
Qwen2-VL's merger, where a token is one vector; the mean includes the contextual token itself (the published code adds the mean of the others to it,
which doubles its length). At budget keep: one stage before the decoder with that keep, both kinds counted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...plugins.compaction import keep_top, merge_by_slot
from ...plugins.importance import received_attention
from ..models import Compacted, TowerState, VisionGraph
from ..schedule import Stage, keep_count
from .base import Method, single_stage

__all__ = ["VISIONZIP", "VisionZipVision"]

CONTEXTUAL_SHARE = 10 / 64  # published


class VisionZipVision(VisionGraph):
    """Dominant tokens stay as they are; a contextual token keeps its place and its index."""

    def score(self, query: Tensor, key: Tensor, state: TowerState) -> Tensor:
        _, received = received_attention(query, key, scale=self.shape.head_dim**-0.5)
        return received.reshape(-1, self.shape.group).mean(1)

    def compact(self, stage: Stage, features: Tensor, state: TowerState, final: bool = False) -> Compacted:
        if state.key is None:
            raise ValueError("visionzip compares the keys of the block that was scored last: its stage must follow one")
        kept, slot = zip_tokens(state.importance, self._token_keys(state.key), keep_count(state.budget, stage.keep))
        alike = torch.ones_like(state.importance)  # equal weights: a mean
        merged = merge_by_slot(features, alike, kept, slot)
        return Compacted(merged, state.importance[kept], kept)

    def _token_keys(self, key: Tensor) -> Tensor:
        """[heads, alive · G, head_dim] → float32 [alive, head_dim]."""
        return key.float().mean(0).reshape(-1, self.shape.group, self.shape.head_dim).mean(1)


def zip_tokens(importance: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Survivors and what the others are merged into.

    Args:
        importance: float32 [alive]; keys: float32 [alive, D].

    Returns:
        kept int64 [count] ascending, and slot int64 [alive]: the place in ``kept`` of the survivor that a token is part of, −1 if of none.
    """
    contextual = round(count * CONTEXTUAL_SHARE)
    slot = torch.full_like(importance, -1, dtype=torch.int64)
    dominant = keep_top(importance, count - contextual)
    slot[dominant] = 0
    rest = (slot < 0).nonzero()[:, 0]
    targets = rest[torch.arange(contextual, device=rest.device) * rest.shape[0] // max(1, contextual)]
    kept = torch.cat([dominant, targets]).sort().values
    if contextual:
        direction = F.normalize(keys, dim=1)
        nearest = targets[(direction[rest] @ direction[targets].T).argmax(1)]
        slot[rest] = torch.searchsorted(kept, nearest)
    slot[kept] = torch.arange(count, device=kept.device)  # each its own, equal keys or not
    return kept, slot


VISIONZIP = Method("visionzip", single_stage, vision=VisionZipVision)
