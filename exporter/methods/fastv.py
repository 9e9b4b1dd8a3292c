"""FastV (arXiv 2403.06764, ECCV 2024): after the decoder's second layer, keep the tokens that the last prompt token looks at most.

The paper prunes once, before layer K = 2 of 32, by the attention that layer K − 1 gives from the last token, mean over heads. Left open: K for other
depths, taken in proportion here and at least 1. Two differences: each head's attention is normalised over the visual tokens alone
(``plugins/guidance.py``), so heads that look at text count as much as others; and a budget is an average over layers, not the share after K.

At budget keep: the first K layers see all tokens, and what that leaves of the average keep is the stage's. Below K/L and a little it cannot be met.
Exportable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..budget import spend_keep
from ..schedule import KEEP_UNIT, Schedule, ScheduleError, Stage
from ..shape import ModelShape
from .base import Method

__all__ = ["FASTV", "last_token_schedule"]

LAYER_SHARE = 2 / 32  # published: before layer 2 of LLaVA-1.5's 32


def last_token_schedule(name: str, layers: int, keep: float, starts: Sequence[int], share: Callable[[int], float]) -> Schedule:
    """Decoder stages before layers ``starts``, ranked by the last token's attention, with nothing pruned before the first of them.

    Args:
        share: survivors wished for at stage 1, 2, … as a share of the original tokens; the last stage takes what the budget leaves.

    Raises:
        ScheduleError: the layers before the first stage spend more than the budget.
    """
    whole = starts[0]
    least = (whole * KEEP_UNIT + layers - whole) / (layers * KEEP_UNIT)
    if keep < least:
        shown = math.ceil(1000 * least) / 1000
        raise ScheduleError(f"{name} keeps its first {whole} layers whole: average keep {shown:g} is the least it can meet")
    keeps = spend_keep(layers, keep, (0, *starts), lambda number, least, most: KEEP_UNIT * (share(number) if number else 1.0))
    stages = tuple(Stage("decoder", layer, kept) for layer, kept in zip(starts, keeps[1:], strict=True))
    return Schedule(stages=stages, guidance_weight=1.0)


def _schedule(shape: ModelShape, keep: float) -> Schedule:
    if keep == 1:
        return Schedule()
    layers = shape.decoder.layers
    return last_token_schedule("fastv", layers, keep, (max(1, round(LAYER_SHARE * layers)),), lambda number: 1.0)


FASTV = Method("fastv", _schedule, scores_attention=False)
