"""M-RoPE position ids of prompts whose images have lost visual tokens.

Text counts on along all three axes (temporal, height, width). An image's survivors keep the position that they had in the whole
image, so nothing pruned moves anything; Hugging Face's ``Qwen2VLModel.get_rope_index`` is the unpruned case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["ImageSurvivors", "prompt_positions", "text_positions"]


@dataclass(frozen=True)
class ImageSurvivors:
    """The visual tokens of one image that reach the decoder.

    ``index`` int64 [M], ascending: original index row · columns + column in a grid of ``rows`` × ``columns`` visual tokens.
    """

    rows: int
    columns: int
    index: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.index.ndim != 1 or (self.index.size and not 0 <= self.index.min() <= self.index.max() < self.rows * self.columns):
            raise ValueError(f"index must be a vector in 0..{self.rows * self.columns - 1} of a grid of {self.rows} x {self.columns}")


def text_positions(start: int, count: int) -> NDArray[np.int64]:
    """Positions of ``count`` text tokens from ``start`` on: int64 [3, count], the three axes equal."""
    return np.broadcast_to(np.arange(start, start + count, dtype=np.int64), (3, count)).copy()


def prompt_positions(
    token_ids: NDArray[np.int64], images: Sequence[ImageSurvivors], *, image_token: int, renumber_first_stage: bool
) -> tuple[NDArray[np.int64], int]:
    """Position ids of a whole prompt.

    Args:
        token_ids: int64 [S], every image's surviving tokens (and nothing else) written as ``image_token``.
        images: survivors of each image, in prompt order.
        renumber_first_stage: survivors get consecutive ids as if they were text (``Schedule.renumber_first_stage``).

    Returns:
        int64 [3, S], and the position of the token that follows: one more than the last text token, and after an image where its
        text would go on.

    Raises:
        ValueError: the image tokens in ``token_ids`` are not as many as the survivors.
    """
    visual = np.flatnonzero(token_ids == image_token)
    if visual.size != sum(image.index.size for image in images):
        raise ValueError(f"prompt has {visual.size} image tokens, its images have {sum(image.index.size for image in images)} survivors")
    positions = np.empty((3, token_ids.size), np.int64)
    column, start, taken = 0, 0, 0
    for image in images:
        count = image.index.size
        first = int(visual[taken])
        positions[:, column:first] = text_positions(start, first - column)
        start += first - column
        if renumber_first_stage:
            positions[:, first : first + count] = text_positions(start, count)
            start += count
        else:
            positions[0, first : first + count] = start
            positions[1, first : first + count] = start + image.index // image.columns
            positions[2, first : first + count] = start + image.index % image.columns
            start += max(image.rows, image.columns)
        column, taken = first + count, taken + count
    positions[:, column:] = text_positions(start, token_ids.size - column)
    return positions, start + token_ids.size - column
