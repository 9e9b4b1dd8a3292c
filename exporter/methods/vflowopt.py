"""VFlowOpt as published (arXiv 2508.05211, ICCV 2025): context relevance from global tokens, prune and recycle, three decoder stages.

What the method does is told in docs/algorithm.md; this is ``--preset paper``, everything beyond the paper off. The paper searches its parameters for
each model and publishes those of LLaVA-OneVision-7B at three budgets; the nearest budget's are taken, untuned. At budget keep: the first two stages
keep their published ratios, the last is solved for the average keep over decoder layers. Exportable.
"""

from __future__ import annotations

from ..presets import preset_schedule
from .base import Method

__all__ = ["VFLOWOPT_PUBLISHED"]

VFLOWOPT_PUBLISHED = Method("paper", lambda shape, keep: preset_schedule("paper", shape, keep))
