"""EntropyPrune (arXiv 2602.17196): once in the decoder, keep the visual tokens whose own state has most matrix entropy. Evaluation only.

A token's hidden state is seen as a matrix of heads × head_dim; its von Neumann entropy is that of the eigenvalues of the trace-normalised Gram matrix
(of the two, the smaller, which has the same ones). No attention enters. The stage stands at the "entropy collapse layer", where the matrix entropy of
all visual states drops most; ``collapse_layer`` finds it from hidden states of calibration data.

The schedule does not look for it, as a schedule has only shapes: it takes a fixed depth, 1/28 of the layers, which is our choice and no finding (the
authors' scripts prune at layer 1 of 28 in Qwen2.5-VL-7B and at 2 of 32 in LLaVA-1.5). Left open: centring (none here) and the matrix (the hidden
state here; the authors' scripts take the token's queries).

At budget keep: the layers before the stage see all tokens, the rest of the average keep is the stage's. Where even the fixed depth spends too much it
moves to the deepest layer that can still be paid, and where not even layer 1 can, the stage stands before layer 0, on the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...plugins.compaction import keep_top
from ..budget import spend_keep
from ..models import Compacted, LanguageGraph, TowerState, VisionGraph
from ..schedule import KEEP_UNIT, Schedule, Stage, keep_count
from ..shape import ModelShape
from .base import Method, single_stage

__all__ = ["ENTROPYPRUNE", "EntropyPruneLanguage", "EntropyPruneVision", "collapse_layer", "matrix_entropy", "token_entropy"]

LAYER_SHARE = 1 / 28  # depth of the stage


class EntropyPruneVision(VisionGraph):
    """The stage before layer 0, where the budget leaves no later one."""

    def __init__(self, visual: Any, shape: ModelShape, schedule: Schedule) -> None:
        super().__init__(visual, shape, schedule)
        self.decoder_heads = shape.decoder.heads

    def compact(self, stage: Stage, features: Tensor, state: TowerState, final: bool = False) -> Compacted:
        kept = keep_top(token_entropy(state.own(features), self.decoder_heads), keep_count(state.budget, stage.keep))
        return Compacted(features[kept], state.importance[kept], kept)


class EntropyPruneLanguage(LanguageGraph):
    """The stage inside the decoder."""

    def rank(self, layer: int, hidden: Tensor, ranking: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(ranking < float("inf"), token_entropy(hidden[0], self.shape.heads), ranking)


def token_entropy(hidden: Tensor, heads: int) -> Tensor:
    """Von Neumann entropy of each token's state as a matrix of ``heads`` rows: [S, H] → float32 [S], nats."""
    return matrix_entropy(hidden.float().reshape(hidden.shape[0], heads, -1))


def matrix_entropy(matrices: Tensor) -> Tensor:
    """Von Neumann entropy of trace-normalised Gram matrices: [..., rows, columns] → [...], nats; 0 for a matrix of zeros."""
    short = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.transpose(-2, -1)
    share: Tensor = torch.linalg.eigvalsh(short @ short.transpose(-2, -1)).clamp(min=0)  # [..., rows]
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy


def collapse_layer(hidden_states: Sequence[Tensor]) -> int:
    """The layer before which the matrix entropy of the visual states has dropped most since the layer before: from 1 on.

    Args:
        hidden_states: [V, H] each, the visual tokens as they enter layer 0, 1, …; at least two.
    """
    entropy = torch.stack([matrix_entropy(hidden.float()) for hidden in hidden_states])
    return int((entropy[:-1] - entropy[1:]).argmax()) + 1


def _schedule(shape: ModelShape, keep: float) -> Schedule:
    layers = shape.decoder.layers
    affordable = (int(keep * KEEP_UNIT * layers + 1e-9) - layers) // (KEEP_UNIT - 1)  # whole layers, with 1/1024 left for each of the others
    layer = min(max(1, round(LAYER_SHARE * layers)), affordable, layers - 1)
    if keep == 1 or layer < 1:
        return single_stage(shape, keep)
    _, kept = spend_keep(layers, keep, (0, layer), lambda number, least, most: most)
    return Schedule(stages=(Stage("decoder", layer, kept),))


ENTROPYPRUNE = Method("entropyprune", _schedule, vision=EntropyPruneVision, language=EntropyPruneLanguage, scores_attention=False)
