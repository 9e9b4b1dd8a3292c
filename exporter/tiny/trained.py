"""What the shipped small model was trained for, and what it is measured by."""

from __future__ import annotations

from .scenes import SMALL_KINDS

__all__ = ["BENCH_KINDS", "TRAINED_KINDS"]

# The generator knows three kinds more: `horizontal` and `vertical` (which of two objects is further left, or higher) stayed at chance, and `list`
# at about half; they are left out of its report, and of evaluation unless they are asked for.
TRAINED_KINDS = ("shape", "color", "count", "count_color", "count_shape", "exists")

# What pruning is measured by: the same, and three of them once more about objects smaller than a visual token only, which a tenth of the tokens loses
# first. Their words are those of the kinds they come from, so the model has seen them all.
BENCH_KINDS = (*TRAINED_KINDS, *SMALL_KINDS)
