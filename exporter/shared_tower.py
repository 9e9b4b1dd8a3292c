"""The unpruned tower, computed once a picture and shared by every schedule: what does not change between trials or methods.

Kept are the hidden states before each block at which someone may start to differ, and the attention statistics of the block before, from which the
importance for any parameters follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..plugins.importance import add_entropy, context_relevance, global_tokens, masked_column_mean, received_attention
from .models import Embedded, TowerState, VisionGraph
from .reference import Picture, ReferenceModel
from .schedule import KEEP_UNIT, Importance, Schedule

__all__ = ["SharedTower", "WalkedTower"]


@dataclass(frozen=True)
class Scoring:
    """Attention statistics of one block over all patches: what any importance parameters need."""

    query: Tensor  # T [heads, P, head_dim]
    key: Tensor
    row_lse: Tensor  # float32 [heads, P]
    received: Tensor  # float32 [P]


@dataclass(frozen=True)
class WalkedTower:
    """One picture's unpruned tower: its state before and behind blocks where schedules may start to differ, and what leaves the merger, T [N, H].

    ``scorings`` are made when they are first asked for. ``finals``, where it is a dictionary, keeps what each schedule's tower has given: worth
    it where many differ in the decoder alone, and not in a search, where hardly any two are alike.
    """

    picture: Picture
    states: Mapping[int, TowerState]
    visual_embeds: Tensor
    finals: dict[Any, tuple[TowerState, Tensor]] | None = None
    scorings: dict[int, Scoring] = field(default_factory=dict)


class SharedTower:
    """Embeds pictures under any schedule, from the first block on that is not as without pruning.

    Args:
        blocks: tower blocks before which a first tower stage may stand; kept besides: the start, and the end for schedules without tower stages.
    """

    def __init__(self, reference: ReferenceModel, blocks: Sequence[int] = ()) -> None:
        self._shape = reference.shape
        self._plain, _ = reference.graphs(Schedule())
        tower = self._shape.tower
        entries = {*blocks, tower.blocks} - {0}
        ranking = (tower.ranking_block(block - 1) for block in entries)
        self._kept = sorted({*entries, *(block for block in ranking if block is not None)})

    @torch.inference_mode()
    def walk(self, picture: Picture, *, keep_finals: bool = False) -> WalkedTower:
        """Compute what is shared."""
        state = self._plain.begin(picture.pixel_values, picture.entropy, picture.tokens)
        states, position = {0: state}, 0
        for place in self._kept:
            state = self._plain.run_blocks(state, position, place)
            states[place], position = state, place
        return WalkedTower(picture, states, self._plain.merge(state), {} if keep_finals else None)

    @torch.inference_mode()
    def embed(self, graph: VisionGraph, walked: WalkedTower) -> Embedded:
        """visual_embeds, importance and index of a picture under ``graph``'s schedule."""
        schedule = graph.schedule
        counts = bool(schedule.proportional_attention)  # how many tokens each stands for
        key = (type(graph), schedule.tower_stages, graph.scoring_blocks, schedule.importance, counts)
        if walked.finals is not None and key in walked.finals:
            state, visual_embeds = walked.finals[key]
        else:
            state = self._final_state(graph, walked)
            visual_embeds = graph.merge(state) if schedule.tower_stages else walked.visual_embeds
            if walked.finals is not None:
                walked.finals[key] = state, visual_embeds
        embedded: Embedded = graph.finish(state, visual_embeds)
        return embedded

    def _final_state(self, graph: VisionGraph, walked: WalkedTower) -> TowerState:
        """The state behind the last block."""
        blocks, schedule, picture = self._shape.tower.blocks, graph.schedule, walked.picture
        if 0 in graph.stages or type(graph).begin is not VisionGraph.begin:
            return graph.run_blocks(graph.begin(picture.pixel_values, picture.entropy, picture.tokens), 0, blocks)
        first = schedule.tower_stages[0].layer if schedule.tower_stages else blocks
        ranked = min(graph.scoring_blocks, default=blocks)  # the first block that is scored
        if ranked == blocks or (type(graph).score is VisionGraph.score and {first, ranked} <= walked.states.keys()):
            state = walked.states[first]
            if graph.scoring_blocks:
                scoring = self._scoring(walked, ranked)
                importance = self._importance(walked, ranked, schedule.importance)
                state = replace(state, importance=importance, query=scoring.query, key=scoring.key)
        else:
            first = max(block for block in walked.states if block <= min(first, ranked))
            state = walked.states[first]
        return graph.run_blocks(state, first, blocks)

    def _scoring(self, walked: WalkedTower, block: int) -> Scoring:
        """Statistics of a block, computed when first asked for."""
        if block not in walked.scorings:
            query, key = self._plain.attend(block, walked.states[block])
            walked.scorings[block] = Scoring(query, key, *received_attention(query, key, scale=self._shape.tower.head_dim**-0.5))
        return walked.scorings[block]

    def _importance(self, walked: WalkedTower, block: int, settings: Importance) -> Tensor:
        """Importance by ``block`` for any parameters: float32 [N]; of the map, only the global tokens' rows are computed."""
        scoring, scale = self._scoring(walked, block), self._shape.tower.head_dim**-0.5
        if settings.score_rows < KEEP_UNIT:  # a sample of rows is scored anew, which costs as little as it does in the graph
            relevance = context_relevance(
                scoring.query,
                scoring.key,
                scale=scale,
                global_threshold=settings.global_threshold,
                score_rows=settings.score_rows,
                global_rows=settings.global_rows,
            )
        elif settings.global_threshold == 0:
            relevance = scoring.received / scoring.received.shape[0]
        else:
            rows = global_tokens(scoring.received, settings.global_threshold).nonzero()[:, 0]
            everyone = torch.ones(rows.shape[0], dtype=torch.bool)
            relevance = masked_column_mean(scoring.query[:, rows], scoring.key, scoring.row_lse[:, rows], everyone, scale=scale)
        mapped = add_entropy(relevance, walked.picture.entropy.reshape(-1), entropy_weight=settings.entropy_weight)
        return mapped.reshape(-1, self._shape.tower.group).mean(1)


@torch.inference_mode()
def embed_plainly(graph: VisionGraph, picture: Picture) -> Embedded:
    """The same with nothing shared."""
    embedded: Embedded = graph(picture.pixel_values, picture.entropy, torch.zeros(picture.tokens, dtype=torch.int32))
    return embedded
