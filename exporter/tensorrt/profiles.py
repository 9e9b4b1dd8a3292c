"""Optimisation profiles of TensorRT engines: the sizes that a request can have, from the schedule's segments and the engine's limits.

A profile is a box of sizes, and what an engine reserves follows from the box's largest corner. So the boxes are drawn such that no size inside
the graphs is larger anywhere than it is in that corner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...engines.graphs import Profile
from ...engines.manifest import Limits, Segment
from ...engines.preprocess import MAX_ASPECT_RATIO

__all__ = ["language_profiles", "vision_profiles"]

USUAL_TEXT_TOKENS = 64  # of a prompt; where an engine is tuned to, not a limit
# A decoding step is one token. Built for exactly one, TensorRT for RTX 1.7 lays every weight out once more for it: 5.7 GB instead of 3.1 GB at the 2B
# shape in fp16 (and 15.9 GB of memory to build instead of 10.2). Built for one or two it shares them with prefill, and it specialises kernels
# to the sizes that it meets anyway. Which is faster has not been measured: that needs a GPU.
MOST_DECODE_TOKENS = 2
# Rounding sides to whole tokens can turn a strip of 200 : 1 into one of this ratio (half a token less on one side of 1.5).
MAX_GRID_RATIO = 1.5 * MAX_ASPECT_RATIO


def vision_profiles(limits: Limits) -> tuple[Profile, ...]:
    """Grids of one image of N ≤ ``max_visual_tokens`` tokens: up to 4 : 1 at full size, and taller and wider strips.

    Three boxes, because one that held every strip both ways would have N² tokens in its corner. These have 4 N and, the strips, 9 N.
    """
    most = limits.max_visual_tokens
    side = min(most, math.ceil(2 * math.sqrt(most)))
    usual = math.isqrt(most)
    long = min(most, math.ceil(math.sqrt(MAX_GRID_RATIO * most)))
    short = max(1, most // (side + 1))  # with more rows than ``side`` no more columns fit
    budget = 1, usual * usual, most
    square = Profile("square", {"rows": (1, usual, side), "columns": (1, usual, side), "budget": budget})
    if long <= side:
        return (square,)
    across, along = (1, short, short), (1, max(1, min(long, most // short)), long)
    strip = 1, across[1] * along[1], most
    return (
        square,
        Profile("tall", {"rows": along, "columns": across, "budget": strip}),
        Profile("wide", {"rows": across, "columns": along, "budget": strip}),
    )


def language_profiles(segments: Sequence[Segment], limits: Limits) -> tuple[Profile, ...]:
    """Prefill of one request, with images or without (visual and budget length 0), and one step of decoding.

    The tokens that reach segment g are S − (V − ⌈N·κ_g/1024⌉), which falls with V: were V larger in the corner than the first segment's
    ``visual_capacity``, the corner would not be the largest. So several images do not fit whose survivors, rounded up one by one, exceed that.
    """
    most, first = limits.max_visual_tokens, segments[0]
    usual = first.visual_capacity + min(USUAL_TEXT_TOKENS, limits.max_text_tokens)
    one, none = (1, 1, 1), (0, 0, 0)
    prefill = {
        "batch": one,
        "length": (1, usual, first.capacity),
        "visual": (0, first.visual_capacity, first.visual_capacity),
        "budget": (0, most, most),
    }
    decode = {"batch": one, "length": (1, 1, MOST_DECODE_TOKENS), "visual": none, "budget": none}
    return Profile("prefill", prefill), Profile("decode", decode)
