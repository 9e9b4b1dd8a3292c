"""Patch entropy on the GPU (formula in ``entropy.py``): one program a patch, its histogram in registers and shared memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from .contract import ArgumentSpec, KernelSpec

__all__ = ["KERNELS", "PATCH_ENTROPY"]

LEVELS = tl.constexpr(256)


@triton.jit
def _eight_bit(pixels, pixel, channel, mean, deviation, WIDTH: tl.constexpr):
    """One channel of a patch as it was before normalisation: int32 0 … 255, rounded to nearest."""
    value = tl.load(pixels + channel * WIDTH + pixel, mask=pixel < WIDTH, other=0.0).to(tl.float32)
    value = (value * tl.load(deviation + channel) + tl.load(mean + channel)) * 255.0 + 0.5
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def patch_entropy_kernel(patches, mean, deviation, entropy, K: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """e = −Σ_b p_b log2 p_b over the 256 grey levels of one patch, grey = (R + G + B) // 3."""
    patch = tl.program_id(0)
    pixels = patches + patch.to(tl.int64) * K
    pixel = tl.arange(0, TILE)
    red = _eight_bit(pixels, pixel, 0, mean, deviation, WIDTH)
    green = _eight_bit(pixels, pixel, 1, mean, deviation, WIDTH)
    blue = _eight_bit(pixels, pixel, 2, mean, deviation, WIDTH)
    grey = tl.where(pixel < WIDTH, (red + green + blue) // 3, 0)
    padding = tl.where(tl.arange(0, LEVELS) == 0, TILE - WIDTH, 0)  # the tile's rest was counted as black
    share = (tl.histogram(grey, LEVELS) - padding).to(tl.float32) / WIDTH
    bits = -tl.sum(tl.where(share > 0, share * tl.log2(tl.where(share > 0, share, 1.0)), 0.0), 0)
    tl.store(entropy + patch, tl.maximum(bits, 0.0))


def _constants(values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    width = values["K"] // 3
    return {"K": values["K"], "WIDTH": width, "TILE": triton.next_power_of_2(width)}


PATCH_ENTROPY = KernelSpec(
    op="PatchEntropy",
    kernel=patch_entropy_kernel,
    inputs=(
        ArgumentSpec("patches", "T", ("P", "K")),
        ArgumentSpec("mean", "float32", ("3",)),
        ArgumentSpec("deviation", "float32", ("3",)),
    ),
    sizes={},
    outputs=(ArgumentSpec("entropy", "float32", ("P",)),),
    grid=("P", "1", "1"),
    constants=_constants,
    static=("K",),
)
KERNELS = (PATCH_ENTROPY,)
