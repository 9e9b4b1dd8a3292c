"""Control: the tokens that receive most attention in the last tower block; one stage, no entropy, no merging.

VFlowOpt's map with t = 0 and α = 0, and what FasterVLM (arXiv 2412.01818) and others rank by, for towers without a class token.
"""

from __future__ import annotations

from .base import Method, single_stage

__all__ = ["ATTENTION"]

ATTENTION = Method("attention", single_stage)
