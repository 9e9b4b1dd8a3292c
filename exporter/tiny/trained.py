"""What the shipped small model was trained for."""

from __future__ import annotations

__all__ = ["TRAINED_KINDS"]

# The generator knows three kinds more: `horizontal` and `vertical` (which of two objects is further left, or higher) stayed at chance, and `list`
# at about half; they are left out of its report, and of evaluation unless they are asked for.
TRAINED_KINDS = ("shape", "color", "count", "count_color", "count_shape", "exists")
