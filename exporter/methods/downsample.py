"""What a user does without any of this (``max_pixels``): send a smaller picture, so that tower and decoder both shrink.

The picture is resized, by the checkpoint's own image processor, to as many visual tokens as the budget keeps. arXiv 2510.07143 finds that this beats
many published methods at equal cost.
"""

from __future__ import annotations

from ..schedule import Schedule
from .base import Method

__all__ = ["DOWNSAMPLE"]

DOWNSAMPLE = Method("downsample", lambda shape, keep: Schedule(), image_share=lambda keep: keep)
