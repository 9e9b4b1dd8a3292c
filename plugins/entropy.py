"""Patch entropy from normalised pixels (docs/algorithm.md, section 1).

    PatchEntropy    e_i = −Σ_b p_ib log2 p_ib, p_i the histogram of the patch's grey levels (R + G + B) // 3, 256 bins      [P]

VFlowOpt (arXiv 2508.05211), section 3.2. The research code takes normalised pixels wrapped into uint8; here the normalisation is undone,
rounded and clipped first. An engine gets its entropies from the host, from the 8-bit pixels themselves (``engines/preprocess.py``), so
there is no ONNX function: this op serves PyTorch programs that hold normalised patches only. Half precision loses the lowest bits of a
pixel, and the entropy with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .torch_ops import register

__all__ = ["patch_entropy"]

LEVELS = 256
CHANNELS = 3
CHUNK = 1024  # patches whose histograms the reference holds at once


def patch_entropy(patches: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Shannon entropy of each patch's grey levels, in bits, 0 … 8.

    Args:
        patches: [P, 3 · pixels], normalised, the three channels one after another; mean, deviation: float32 [3], of 0 … 1 values.

    Returns:
        float32 [P].
    """
    entropy: Tensor = _patch_entropy(patches, mean, deviation)
    return entropy


def _reference(patches: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    pixels = patches.float().reshape(patches.shape[0], CHANNELS, -1)
    values = (pixels * deviation[:, None] + mean[:, None]) * 255 + 0.5
    grey = values.clamp(0, 255).long().sum(1) // CHANNELS  # [P, pixels]
    entropies = []
    for chunk in torch.split(grey, CHUNK):
        histogram = chunk.new_zeros(chunk.shape[0], LEVELS).scatter_add_(1, chunk, torch.ones_like(chunk))
        share = histogram.float() / chunk.shape[1]
        entropies.append(torch.special.entr(share).sum(1) / torch.tensor(2.0).log())
    return torch.cat(entropies) if entropies else patches.new_empty(0, dtype=torch.float32)


def _shapes(patches: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return patches.new_empty(patches.shape[0], dtype=torch.float32)


_patch_entropy = register(
    "patch_entropy(Tensor patches, Tensor mean, Tensor deviation) -> Tensor", _reference, _shapes, "entropy_kernels:PATCH_ENTROPY"
)
