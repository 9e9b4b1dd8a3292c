"""Muon (Jordan et al., 2024): momentum made orthogonal, for the matrices of a network."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Muon:
    """Momentum orthogonalised by five Newton–Schulz steps for the matrices; equal shapes are stacked into one product."""

    def __init__(self, matrices: Sequence[nn.Parameter], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            self.groups[tuple(matrix.shape)].append(matrix)
        self.moments = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, rate: float, weight_decay: float = 0.01) -> None:
        for shape, group in self.groups.items():
            gradient = torch.stack([p.grad for p in group])
            moment = self.moments[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(moment, self.momentum))
            scale = rate * math.sqrt(max(1.0, shape[0] / shape[1]))
            torch._foreach_mul_(group, 1 - rate * weight_decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    x = matrices.bfloat16()
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if transposed else x).float()
