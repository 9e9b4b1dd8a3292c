"""Rounding at random: as far as rounding goes and no further, and the same for the same seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from vflow.exporter.random_rounding import HALF_ULP, RandomRounding


def product(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x · w rounded at random, and as it is."""
    generator = torch.Generator().manual_seed(3)
    x, w = (torch.rand(64, 64, generator=generator).to(dtype) for _ in range(2))
    with torch.inference_mode(), RandomRounding(seed):
        rounded = F.linear(x, w)
    return rounded, F.linear(x, w)


def test_a_result_is_off_by_a_few_roundings() -> None:
    rounded, plain = product(1)
    relative = ((rounded - plain) / plain).abs().max()
    assert 0 < relative <= 8 * HALF_ULP[torch.float32]  # positive terms: nothing cancels


def test_half_precision_is_off_by_as_many_of_its_own() -> None:
    rounded, plain = product(1, torch.float16)
    relative = ((rounded - plain).float() / plain.float()).abs().max()
    assert HALF_ULP[torch.float32] * 100 < relative <= 8 * HALF_ULP[torch.float16]


def test_a_mask_stays_a_mask() -> None:
    """−∞ times a random factor is NaN, and a run that is NaN would count for nothing."""
    x, mask = torch.rand(1, 1, 4, 8), torch.full((1, 1, 4, 4), float("-inf")).triu(1)
    with torch.inference_mode(), RandomRounding(1):
        mixed = F.scaled_dot_product_attention(x, x, x, mask)
    assert mixed.isfinite().all() and not torch.equal(mixed, F.scaled_dot_product_attention(x, x, x, mask))


def test_a_seed_rounds_the_same_way_again() -> None:
    assert torch.equal(product(1)[0], product(1)[0])
    assert not torch.equal(product(1)[0], product(2)[0])


def test_float64_and_what_only_moves_values_stay() -> None:
    assert torch.equal(*product(1, torch.float64))
    x = torch.rand(8, 8)
    with RandomRounding(1):
        moved = torch.where(x > 0.5, x, -x.T.clone().reshape(8, 8)[torch.arange(8)])
    assert torch.equal(moved, torch.where(x > 0.5, x, -x.T))
