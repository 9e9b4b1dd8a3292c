"""LVTP, "Back to Fundamentals" (arXiv 2504.17996): multi-scale Tsallis entropy weighs attention, Sobel edges protect tokens. Evaluation only.

A patch's attention to the others has the Tsallis entropy S_q = (1 − Σ p^q) / (q − 1); over several q it tells whether the patch looks anywhere in
particular. Received attention is summed over patches that each count 1 − (mean over q of S_q as a share of its maximum), so that patches which look
everywhere hardly vote. Tokens with strong edges in the picture survive whatever their score.

The paper prunes segmentation transformers progressively and merges the rest by two clusterings; here it is one stage before the decoder, and what is
not kept is dropped (the clusterings decide how many tokens there are, which a budget does already). Not on the paper's public pages, and chosen: q,
the weights' form, the last tower block, a Sobel strength that is the mean over a patch of the grey picture, and that edges hold a quarter of the
budget. At budget keep: that stage's keep, protected tokens included.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...plugins.compaction import keep_top
from ...plugins.importance import masked_column_mean, row_log_sum_exp
from ..models import Compacted, TowerState, VisionGraph
from ..schedule import Stage, keep_count
from .base import Method, single_stage

__all__ = ["LVTP", "LvtpVision", "entropy_weights", "sobel_strength"]

SCALES = (0.5, 2.0, 4.0)  # q; 1, which is Shannon's entropy, lies between
EDGE_SHARE = 4  # one survivor in so many is an edge token
LEAST_WEIGHT = 1e-6  # of a patch that looks everywhere alike; its logarithm is taken
CHANNELS, FRAMES = 3, 2  # of a patch, in this order (engines/preprocess.py)


class LvtpVision(VisionGraph):
    """Edge strength per patch travels in the place of the entropy, which this method does not use."""

    def begin(self, pixel_values: Tensor, entropy: Tensor | None, budget: int) -> TowerState:
        return replace(super().begin(pixel_values, None, budget), entropy=sobel_strength(pixel_values, self.shape.merge_size))

    def score(self, query: Tensor, key: Tensor, state: TowerState) -> Tensor:
        scale = self.shape.head_dim**-0.5
        row_lse, weight = entropy_weights(query, key, scale)
        everyone = torch.ones_like(row_lse[0], dtype=torch.bool)
        voted = masked_column_mean(query, key, row_lse - weight.log(), everyone, scale=scale)  # a weight is a shift of its row's log-sum-exp
        return voted.reshape(-1, self.shape.group).mean(1)

    def compact(self, stage: Stage, features: Tensor, state: TowerState, final: bool = False) -> Compacted:
        if state.entropy is None:
            raise ValueError("lvtp needs the patches' edge strength in the state; start from begin")
        count = keep_count(state.budget, stage.keep)
        edges = state.entropy.reshape(-1, self.shape.group).mean(1)
        strongest = keep_top(edges, count // EDGE_SHARE)
        protected = strongest[edges[strongest] > 0]  # a blank picture has none
        kept = keep_top(state.importance.index_fill(0, protected, float("inf")), count)
        return Compacted(features[kept], state.importance[kept], kept)


def entropy_weights(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """How much each row of the attention map says: its log-sum-exp and its weight in (0, 1], float32 [heads, P] each.

    Σ_j p_j^q = exp(λ_q − q λ_1), with λ_q the log-sum-exp of the scores times q: no map is formed.
    """
    row_lse = row_log_sum_exp(query, key, scale=scale)
    patches, entropy = key.shape[1], torch.zeros_like(row_lse)
    for q in SCALES:
        powers = torch.exp(row_log_sum_exp(query, key, scale=q * scale) - q * row_lse)
        most = 1 - float(patches) ** (1 - q)  # of 1 − Σ p^q, where all p are equal
        entropy += (1 - powers) / most if patches > 1 else 0.0
    return row_lse, (1 - entropy / len(SCALES)).clamp(LEAST_WEIGHT, 1.0)


def sobel_strength(pixel_values: Tensor, merge_size: int) -> Tensor:
    """Mean gradient of the grey picture over each patch: [rows, columns, G, patch_dim] → float32 [P], patches in merge order."""
    rows, columns, _, patch_dim = pixel_values.shape
    side = math.isqrt(patch_dim // (CHANNELS * FRAMES))
    grey = pixel_values.float().reshape(rows, columns, merge_size, merge_size, CHANNELS * FRAMES, side, side).mean(4)
    picture = grey.permute(0, 2, 4, 1, 3, 5).reshape(1, 1, rows * merge_size * side, columns * merge_size * side)
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=grey.device)
    gradient = F.conv2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), torch.stack([across, across.T])[:, None])  # [1, 2, height, width]
    strength = gradient.square().sum(1).sqrt().reshape(rows, merge_size, side, columns, merge_size, side)
    return strength.permute(0, 3, 1, 4, 2, 5).reshape(-1, side * side).mean(1)


LVTP = Method("lvtp", single_stage, vision=LvtpVision)
