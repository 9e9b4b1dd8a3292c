"""What the shipped small model was trained for."""

from __future__ import annotations

__all__ = ["TRAINED_KINDS"]

# The generator also knows `horizontal` and `vertical` (which of two objects is further left, or higher): they stayed at chance and are left out.
TRAINED_KINDS = ("shape", "color", "count", "count_color", "count_shape", "exists", "list")
