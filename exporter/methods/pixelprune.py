"""PixelPrune (arXiv 2604.00886): before the tower, drop tokens whose pixels a neighbour predicts, as lossless image coders do. Evaluation only.

In raster order a token is predicted by the one to its left or the one above, whichever side the token between them, to the upper left, says the edge
runs: above if the upper-left token equals the left and not the upper one, else left. It is dropped if it equals its prediction within τ, the
largest difference of a pixel; the first token is never dropped. The paper fixes τ (0: only exact duplicates go), and the number of tokens follows
from the picture.

At budget keep it is the other way round: a token's rank is the smallest τ at which that rule drops it, so that τ rises until the budget is met. One
stage before tower block 0, and the decoder sees exactly its survivors: tower and cache shrink alike. Left out: with τ > 0 the paper compares with
what would be reconstructed, token by token, so that errors do not add up along a run; here with the neighbour itself. Differences are those of
normalised pixels, whose channels differ in scale by a few percent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..budget import spend_keep
from ..models import VisionGraph
from ..schedule import Schedule, Stage
from ..shape import ModelShape
from .base import Method

__all__ = ["PIXELPRUNE", "PixelPruneVision", "drop_thresholds"]

NEVER = 1e30  # threshold of a token that nothing predicts; far above any pixel, and finite


class PixelPruneVision(VisionGraph):
    """Importance before block 0 is the threshold at which a token would be dropped."""

    def rank_pixels(self, pixel_values: Tensor, entropy: Tensor | None) -> Tensor:
        return drop_thresholds(pixel_values).reshape(-1)


def drop_thresholds(pixel_values: Tensor) -> Tensor:
    """Smallest τ at which each token is dropped: pixels [rows, columns, G, patch_dim] → float32 [rows, columns]."""
    pixels = pixel_values.float().flatten(2)
    from_left = (pixels[:, 1:] - pixels[:, :-1]).abs().amax(2)  # [rows, columns − 1]
    from_upper = (pixels[1:] - pixels[:-1]).abs().amax(2)  # [rows − 1, columns]
    threshold = torch.full(pixels.shape[:2], NEVER, device=pixels.device)
    threshold[0, 1:], threshold[1:, 0] = from_left[0], from_upper[:, 0]
    # The upper one predicts for τ from `corner_left` (upper left against left) up to `corner_upper` (upper left against upper), else the left one.
    left, upper, corner_left, corner_upper = from_left[1:], from_upper[:, 1:], from_upper[:, :-1], from_left[:-1]
    by_upper = torch.maximum(upper, corner_left)
    by_left = torch.where((corner_left <= left) & (left < corner_upper), corner_upper, left)
    threshold[1:, 1:] = torch.where(by_upper < corner_upper, torch.minimum(by_upper, by_left), by_left)
    return threshold


def _schedule(shape: ModelShape, keep: float) -> Schedule:
    if keep == 1:
        return Schedule()
    (kept,) = spend_keep(shape.decoder.layers, keep, (0,), lambda number, least, most: most)
    return Schedule(stages=(Stage("tower", 0, kept),))


PIXELPRUNE = Method("pixelprune", _schedule, vision=PixelPruneVision, scores_attention=False)
