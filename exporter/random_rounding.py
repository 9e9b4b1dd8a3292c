"""Monte Carlo arithmetic in PyTorch: what a precision loses on an input, seen in evaluations that differ in how each operation rounds.

The operands and the result of each operation are multiplied by 1 + u · 2⁻²⁴ (float16: 2⁻¹¹), u uniform in [−1, 1]: at most half a unit in the last
place, no more than rounding does. Operands count because a sum rounds each of its terms. A runtime that sums in another order or fuses other
operations is one more such evaluation. (D. Stott Parker, Monte Carlo Arithmetic, 1997; CESTAC, J. Vignes, 1993, is the same thought.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["RandomRounding"]

HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}  # relative
EXACT = {"where", "clone", "copy_", "neg", "clamp"}  # element by element, and nothing is rounded
SUMS = {
    "linear",
    "matmul",
    "mm",
    "addmm",
    "bmm",
    "softmax",
    "_softmax",
    "layer_norm",
    "native_layer_norm",
    "mean",
    "sum",
    "scaled_dot_product_attention",
}


class RandomRounding(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch has not typed it
    """Within it float32 and float16 operations round at random; the same seed rounds the same way. The project's own operators, which score and
    choose tokens, are left as they are, and so is what moves values or changes them in place."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        rounds = name in SUMS or (torch.Tag.pointwise in func.tags and name not in EXACT and not name.endswith("_"))
        if not rounds:
            return func(*args, **(kwargs or {}))
        return self._inexact(func(*map(self._inexact, args), **(kwargs or {})))

    def _inexact(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype not in HALF_ULP:
            return value
        half = HALF_ULP[value.dtype]
        noise = torch.rand(value.shape, generator=self._generator).mul_(2 * half).sub_(half)
        wide = value.float()
        return torch.where(value.isfinite(), torch.addcmul(wide, wide, noise).to(value.dtype), value)  # a mask's −∞ is not rounded
