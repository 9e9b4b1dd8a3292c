"""The Hugging Face towers on batches of pictures of one size, as the trainer runs them; their own forward splits attention by picture in a loop."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vflow.exporter.shape import TowerShape

WINDOW = 4  # visual tokens a side of an attention window of Qwen2.5-VL


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class TowerLayout(NamedTuple):
    """What a tower needs to know of a grid of patches: rotary tables in the order of its patches, and for a tower with windows that order.

    ``order`` sorts visual tokens by window, windows of one size side by side; ``windows`` holds (windows, patches a window) of each size.
    """

    rows: int
    columns: int
    cos: Tensor
    sin: Tensor
    order: Tensor | None
    windows: list[tuple[int, int]]


def window_order(rows: int, columns: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Order and windows of ``TowerLayout`` for a grid of visual tokens; windows at its right and bottom edges may be smaller."""
    by_size: dict[int, list[Tensor]] = defaultdict(list)
    for band in torch.arange(rows * columns).view(rows, columns).split(WINDOW):
        for window in band.split(WINDOW, 1):
            by_size[window.numel()].append(window.flatten())
    return torch.cat([w for same in by_size.values() for w in same]), [(len(same), 4 * size) for size, same in by_size.items()]


def attend(q: Tensor, k: Tensor, v: Tensor, windows: Sequence[tuple[int, int]]) -> Tensor:
    """Attention inside windows that lie one after another: [B, heads, P, D] → [B, P, heads × D]. A mask instead costs as much as full attention."""
    batch, pieces = len(q), []
    for parts in zip(*(x.split([count * size for count, size in windows], 2) for x in (q, k, v)), windows, strict=True):
        *qkv, (count, size) = parts
        folded = [x.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1) for x in qkv]
        pieces.append(F.scaled_dot_product_attention(*folded).transpose(1, 2).reshape(batch, count * size, -1))
    return torch.cat(pieces, 1)


def merge_order(rows: int, columns: int) -> Tensor:
    """Patches of a grid, row by row, in the order of the towers: the four of a visual token side by side. int64 [rows · columns]."""
    return torch.arange(rows * columns).view(rows // 2, 2, columns // 2, 2).transpose(1, 2).reshape(-1)


def tower_layout(rows: int, columns: int, sizes: TowerShape) -> TowerLayout:
    axis = sizes.head_dim // 2
    inverse = 1.0 / 10_000 ** (torch.arange(0, axis, 2).float() / axis)
    h, w = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    order = merge_order(rows, columns)
    angles = torch.stack([h.reshape(-1)[order], w.reshape(-1)[order]], -1)[..., None] * inverse
    angles = angles.flatten(1).repeat(1, 2)
    by_window, windows = window_order(rows // 2, columns // 2) if sizes.window else (None, [])
    if by_window is not None:
        angles = angles.unflatten(0, (-1, 4))[by_window].flatten(0, 1)
    return TowerLayout(rows, columns, angles.cos(), angles.sin(), by_window, windows)


def learned_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """A square table [side², C] spread over a grid bilinearly, corner on corner: [P, C]."""
    side = round(len(table) ** 0.5)
    square = table.T.view(1, -1, side, side)
    return F.interpolate(square, (rows, columns), mode="bilinear", align_corners=True)[0].flatten(1).T[merge_order(rows, columns)]


def run_tower(visual: nn.Module, pixel_values: Tensor, grid: TowerLayout) -> list[Tensor]:
    """Visual tokens [B, N, hidden] of pixels [B, P, 1176]; behind them what DeepStack adds to them after each of the decoder's first layers."""
    batch, patches, _ = pixel_values.shape
    if grid.order is not None:  # of the pixels, as they need no gradient
        pixel_values = pixel_values.unflatten(1, (-1, 4))[:, grid.order].flatten(1, 2)
    embedding = visual.patch_embed.proj
    x = pixel_values @ embedding.weight.flatten(1).T
    if embedding.bias is not None:
        x = x + (embedding.bias + learned_positions(visual.pos_embed.weight, grid.rows, grid.columns)).to(x.dtype)
    deepstack = []
    for number, block in enumerate(visual.blocks):
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).view(batch, patches, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        windowed = grid.order is not None and number not in visual.fullatt_block_indexes
        windows = grid.windows if windowed else [(1, patches)]
        x = x + attn.proj(attend(rotate(q, grid.cos, grid.sin), rotate(k, grid.cos, grid.sin), v, windows))
        x = x + block.mlp(block.norm2(x))
        if number in getattr(visual, "deepstack_visual_indexes", ()):
            deepstack.append(visual.deepstack_merger_list[len(deepstack)](x).view(batch, patches // 4, -1))
    merger = visual.merger
    if not hasattr(merger, "ln_q"):
        return [merger(x).view(batch, patches // 4, -1), *deepstack]
    tokens = merger.mlp(merger.ln_q(x).view(batch, patches // 4, -1))
    return [tokens if grid.order is None else tokens[:, grid.order.argsort()]]
