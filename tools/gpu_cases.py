"""The inputs on which ``gpu_check.py`` runs every kernel, what comes out in float64, and the same in plain PyTorch.

Sizes are those of Qwen2-VL-7B on an image of 1,024 and of 4,096 visual tokens (``usual``, ``large``), of a stage in its tower with small cells
(``tower``), odd ones (``odd``), and tiny ones for trying the program itself on a CPU (``tiny``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vflow.plugins.compaction import WEIGHT_FLOOR, group_tokens, keep_top
from vflow.plugins.compaction_kernels import GATHER_TOKENS, MERGE_TOKENS
from vflow.plugins.contract import KernelSpec
from vflow.plugins.entropy_kernels import PATCH_ENTROPY
from vflow.plugins.guidance import KEY_BLOCK
from vflow.plugins.guidance_kernels import LAST_TOKEN_ATTENTION, LAST_TOKEN_LOG_SUM_EXP
from vflow.plugins.importance_kernels import MASKED_COLUMN_MEAN, ROW_LOG_SUM_EXP
from vflow.plugins.selection_kernels import GROUP_TOKENS, KEEP_TOP, KEEP_TOP_PER_CELL

__all__ = ["SIZES", "Case", "Sizes", "cases", "expected_column_mean", "expected_row_lse"]

Inputs = list[Tensor]
EXACT = 0.0
SCORE_TOLERANCE = 1e-4  # float32 sums; an error of 1e-6 in a score of 20 is 2e-5 in its exponential
ENTROPY_TOLERANCE = 1e-4
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # of a result that is rounded once
RELEVANCE_FLOOR = 1e-7  # column means below this rank nothing
ROW_CHUNK = 512  # rows of the map held in float64 at once


@dataclass(frozen=True)
class Sizes:
    """Heads and width of the tower, patches, tokens, survivors, cells; the decoder's heads, width and hidden size."""

    heads: int
    head_dim: int
    patches: int
    tokens: int
    survivors: int
    cells: int
    hidden: int
    decoder_heads: tuple[int, int] = (28, 4)
    decoder_head_dim: int = 128


SIZES = {
    "tiny": Sizes(2, 24, 37, 21, 6, 4, 40, (6, 2), 16),
    "odd": Sizes(3, 80, 517, 131, 33, 7, 3584 - 24),
    "usual": Sizes(16, 80, 4096, 1024, 103, 9, 3584),
    "tower": Sizes(16, 80, 1024, 6084, 2000, 676, 5120),
    "large": Sizes(16, 80, 16384, 16384, 1638, 28, 3584),
}


@dataclass(frozen=True)
class Case:
    """One op on inputs of one size. ``expected`` is computed in float64, ``eager`` in the precision of the inputs; both on their device.

    ``moved`` are the bytes that must be read and written at least, ``operations`` the multiplications and additions of matrix products.
    """

    spec: KernelSpec
    inputs: Inputs
    attributes: dict[str, float]
    expected: Callable[[], Sequence[Tensor]]
    eager: Callable[..., Any]
    tolerances: tuple[float, ...]  # relative, an output each; 0 is bit for bit
    floor: float = 1e-6
    moved: int = 0
    operations: int = 0
    sizes: dict[str, int] = field(default_factory=dict)


def cases(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> list[Case]:
    """Every kernel on fresh inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    scoring = _scoring_cases(
        sizes, normal(sizes.heads, sizes.patches, sizes.head_dim) * 2, normal(sizes.heads, sizes.patches, sizes.head_dim), uniform
    )
    ties = (uniform(sizes.tokens) * sizes.tokens / 2).floor() / sizes.tokens  # about two tokens a value
    compaction = _compaction_cases(sizes, ties, normal, _grid_cells(sizes).to(device))
    return [*scoring, *compaction, *_guidance_cases(sizes, normal, uniform), _entropy_case(sizes, dtype, uniform)]


def _grid_cells(sizes: Sizes) -> Tensor:
    """The cell of each token, tokens lying row by row in a grid that is about square, as cells do: int64 [tokens]."""
    columns, across = math.isqrt(sizes.tokens), math.isqrt(sizes.cells)
    row, column = torch.arange(sizes.tokens) // columns, torch.arange(sizes.tokens) % columns
    down = sizes.cells // across
    return row * down // (int(row[-1]) + 1) * across + column * across // columns


def expected_row_lse(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Rows' log-sum-exp in float64, [H, R]."""
    keys = key.double().transpose(1, 2)
    return torch.cat([torch.logsumexp(rows.double() @ keys * scale, 2) for rows in torch.split(query, ROW_CHUNK, 1)], 1)


def expected_column_mean(query: Tensor, key: Tensor, row_lse: Tensor, row_mask: Tensor, scale: float) -> Tensor:
    """Masked column means in float64, [H, P]."""
    keys = key.double().transpose(1, 2)
    total = torch.zeros(key.shape[:2], dtype=torch.float64, device=key.device)
    for start in range(0, query.shape[1], ROW_CHUNK):
        rows = slice(start, start + ROW_CHUNK)
        attention = torch.exp(query[:, rows].double() @ keys * scale - row_lse[:, rows, None].double())
        total += (attention * row_mask[rows, None]).sum(1)
    return total / row_mask.sum()


def _scoring_cases(sizes: Sizes, query: Tensor, key: Tensor, uniform: Callable[..., Tensor]) -> list[Case]:
    scale = sizes.head_dim**-0.5
    lse = expected_row_lse(query, key, scale).float()
    mask = uniform(sizes.patches) < 0.5
    mask[0] = True
    products = 2 * sizes.heads * sizes.patches**2 * sizes.head_dim
    shown = {"patches": sizes.patches, "heads": sizes.heads}

    def eager_lse(query: Tensor, key: Tensor) -> Tensor:
        return torch.logsumexp((query @ key.transpose(1, 2)).float() * scale, 2)

    def eager_mean(query: Tensor, key: Tensor, row_lse: Tensor, row_mask: Tensor) -> Tensor:
        attention = torch.exp((query @ key.transpose(1, 2)).float() * scale - row_lse[:, :, None])
        return (attention * row_mask[:, None]).sum(1) / row_mask.sum()

    return [
        Case(
            ROW_LOG_SUM_EXP, [query, key], {"scale": scale}, lambda: [expected_row_lse(query, key, scale)], eager_lse,
            (SCORE_TOLERANCE,), floor=1.0, operations=products, sizes=shown,
        ),
        Case(
            MASKED_COLUMN_MEAN, [query, key, lse, mask], {"scale": scale}, lambda: [expected_column_mean(query, key, lse, mask, scale)], eager_mean,
            (SCORE_TOLERANCE,), floor=RELEVANCE_FLOOR, operations=products, sizes=shown,
        ),
    ]  # fmt: skip


def _compaction_cases(sizes: Sizes, importance: Tensor, normal: Callable[..., Tensor], cell: Tensor) -> list[Case]:
    device = importance.device
    survivors = torch.zeros(sizes.survivors, dtype=torch.int32, device=device)
    cells = torch.arange(sizes.cells, device=device)
    on_cpu = importance.cpu()
    *selected, home = torch.ops.vflow.keep_top_per_cell(on_cpu, cell.cpu(), cells.cpu(), survivors.cpu())
    index, slot, members, home, order, start = (x.to(device) for x in (*selected, home, *group_tokens(*selected)))
    features = normal(sizes.tokens, sizes.hidden)
    hidden, cos, sin = normal(1, sizes.tokens, sizes.hidden), normal(1, sizes.tokens, 64), normal(1, sizes.tokens, 64)
    item = features.element_size()
    shown = {"tokens": sizes.tokens, "survivors": sizes.survivors, "width": sizes.hidden}

    def expected_merge() -> list[Tensor]:
        weight = importance.double().clamp(min=0) + WEIGHT_FLOOR
        belongs = (slot[None, :] == torch.arange(sizes.survivors, device=device)[:, None]).double()
        shares = belongs * weight
        return [shares / shares.sum(1, keepdim=True) @ features.double(), belongs @ importance.double()]

    def eager_group(index: Tensor, slot: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        return torch.argsort(torch.where(slot < 0, index.shape[0], slot), stable=True), members.cumsum(0) - members

    def eager_merge(features: Tensor, importance: Tensor, index: Tensor, slot: Tensor, members: Tensor, order: Tensor, start: Tensor) -> Tensor:
        taken = slot >= 0
        weight = torch.where(taken, importance.clamp(min=0) + WEIGHT_FLOOR, 0.0)
        target = slot.clamp(min=0)
        total = torch.zeros(sizes.survivors, device=device).index_add(0, target, weight)
        merged = torch.zeros(sizes.survivors, sizes.hidden, device=device)
        return merged.index_add(0, target, features.float() * (weight / total[target])[:, None]).to(features.dtype)

    def eager_top(key: Tensor, survivors: Tensor) -> Tensor:
        return torch.sort(key, descending=True, stable=True).indices[: survivors.shape[0]].sort().values

    def eager_per_cell(importance: Tensor, cell: Tensor, cells: Tensor, survivors: Tensor) -> Tensor:
        order = torch.sort(importance, descending=True, stable=True).indices  # the least that any form of it needs
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=device))
        best = torch.full_like(cells, order.shape[0]).scatter_reduce(0, cell, rank, "amin")
        key = order.shape[0] * (rank == best[cell]).long() - rank
        return key.topk(survivors.shape[0]).indices.sort().values

    def eager_gather(hidden: Tensor, cos: Tensor, sin: Tensor, key: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        return hidden[:, index], cos[:, index], sin[:, index], key[index]

    rows = sizes.tokens + sizes.survivors
    shuffled = torch.randperm(sizes.tokens, generator=torch.Generator().manual_seed(0))
    half = shuffled[: sizes.tokens // 2].sort().values.to(device)  # as many as stages in the tower keep
    kept = 2 * len(half) * (sizes.hidden + 128) * item
    return [
        Case(KEEP_TOP, [importance, survivors], {}, lambda: [keep_top(on_cpu, sizes.survivors)], eager_top, (EXACT,), sizes=shown),
        Case(
            KEEP_TOP_PER_CELL, [importance, cell, cells, survivors], {}, lambda: [index, slot, members, home], eager_per_cell,
            (EXACT,) * 4, sizes=shown,
        ),
        Case(GROUP_TOKENS, [index, slot, members], {}, lambda: [order, start], eager_group, (EXACT, EXACT), sizes=shown),
        Case(
            MERGE_TOKENS, [features, importance, index, slot, members, order, start], {"floor": WEIGHT_FLOOR}, expected_merge, eager_merge,
            (ROUNDING[features.dtype], SCORE_TOLERANCE), floor=1e-1, moved=rows * sizes.hidden * item, sizes=shown,
        ),
        Case(
            GATHER_TOKENS, [hidden, cos, sin, importance, half], {}, lambda: list(eager_gather(hidden, cos, sin, importance, half)), eager_gather,
            (EXACT,) * 4, moved=kept, sizes=shown | {"survivors": len(half)},
        ),
    ]  # fmt: skip


def _guidance_cases(sizes: Sizes, normal: Callable[..., Tensor], uniform: Callable[..., Tensor]) -> list[Case]:
    """The plain form of the second does without the first."""
    (heads, key_heads), width = sizes.decoder_heads, sizes.decoder_head_dim
    query, key, visual = normal(heads, width) * 2, normal(key_heads, sizes.tokens, width), uniform(sizes.tokens) < 0.9
    scale, moved, shown = width**-0.5, key.numel() * key.element_size(), {"tokens": sizes.tokens, "heads": heads}

    def scores(query: Tensor, key: Tensor, visual: Tensor) -> Tensor:
        products = (query.reshape(key_heads, -1, width) @ key.transpose(1, 2) * scale).reshape(heads, -1)
        return torch.where(visual, products, -torch.inf).to(torch.promote_types(products.dtype, torch.float32))

    def block_lse(query: Tensor, key: Tensor, visual: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(scores(query, key, visual), (0, -visual.shape[0] % KEY_BLOCK), value=-1e30)
        return torch.logsumexp(padded.reshape(heads, -1, KEY_BLOCK), 2)

    def attention(query: Tensor, key: Tensor, visual: Tensor, lse: Tensor) -> Tensor:
        return torch.where(visual, torch.softmax(scores(query, key, visual), 1).mean(0), 0.0)

    exact = [query.double(), key.double(), visual]
    lse = block_lse(*exact)
    return [
        Case(
            LAST_TOKEN_LOG_SUM_EXP, [query, key, visual], {"scale": scale}, lambda: [lse], block_lse,
            (SCORE_TOLERANCE,), floor=1.0, moved=moved, sizes=shown,
        ),
        Case(
            LAST_TOKEN_ATTENTION, [query, key, visual, lse.float()], {"scale": scale}, lambda: [attention(*exact, lse)], attention,
            (SCORE_TOLERANCE,), floor=RELEVANCE_FLOOR, moved=moved, sizes=shown,
        ),
    ]  # fmt: skip


def _entropy_case(sizes: Sizes, dtype: torch.dtype, uniform: Callable[..., Tensor]) -> Case:
    """Pixels are exact in any precision: 8 bits, scaled by 1/256 alone."""
    width = 2 * 14 * 14
    pixels = (uniform(sizes.patches, 3, width) * 64).floor()
    patches = (pixels / 256).to(dtype).reshape(sizes.patches, 3 * width)
    mean, deviation = torch.zeros(3, device=patches.device), torch.full((3,), 256 / 255, device=patches.device)

    def entropy(patches: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        values = (patches.float().reshape(-1, 3, width) * deviation[:, None] + mean[:, None]) * 255 + 0.5
        grey = values.clamp(0, 255).long().sum(1) // 3
        histogram = torch.zeros(grey.shape[0], 256, device=grey.device).scatter_add(1, grey, torch.ones_like(grey, dtype=torch.float32))
        return torch.special.entr(histogram / width).sum(1) / math.log(2)

    def expected() -> list[Tensor]:
        grey = pixels.long().sum(1) // 3
        histogram = torch.zeros(grey.shape[0], 256, dtype=torch.float64, device=grey.device)
        histogram.scatter_add_(1, grey, torch.ones_like(grey, dtype=torch.float64))
        return [torch.special.entr(histogram / width).sum(1) / math.log(2)]

    moved = patches.numel() * patches.element_size()
    return Case(
        PATCH_ENTROPY,
        [patches, mean, deviation],
        {},
        expected,
        entropy,
        (ENTROPY_TOLERANCE,),
        floor=1.0,
        moved=moved,
        sizes={"patches": sizes.patches},
    )
