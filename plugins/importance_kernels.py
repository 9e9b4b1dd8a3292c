"""Importance scoring on the GPU (formulas in ``importance.py``): two streaming passes over Q Kᵀ, the attention map never exists.

Both kernels take scores in base 2 (exp2 is what the hardware has). Head dimensions that are no power of two, as Qwen2-VL's 80, are split
into two parts (64 + 16). Sums run in a fixed order in one program each, so results repeat bit for bit; no atomics.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from .contract import ArgumentSpec, KernelSpec

__all__ = ["KERNELS", "MASKED_COLUMN_MEAN", "ROW_LOG_SUM_EXP", "load_rows", "product_constants"]

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MAX_WIDE_TILE = 96  # head dimension up to which 64 keys fit into shared memory twice
MIN_DOT_WIDTH = 16  # the smallest inner dimension of a matrix product in the Triton language


TYPES = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}


def product_constants(width: int, precision: str) -> dict[str, Any]:
    """D, its two tiles (powers of two of at least 16, the second may be 0: 80 → 64 + 16) and the type of a product's operands."""
    high = max(1 << (width.bit_length() - 1), MIN_DOT_WIDTH)
    low = max(triton.next_power_of_2(width - high), MIN_DOT_WIDTH) if width > high else 0
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter multiplies the bits of bfloat16 as integers
    return {"D": width, "HIGH": high, "LOW": low, "TYPE": TYPES["fp32" if interpreted else precision]}


@triton.jit
def load_rows(matrix, rows, row_total, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    """Columns FIRST … FIRST + WIDTH of some rows of a matrix [row_total, D]; zeros outside. → TYPE [rows, WIDTH]"""
    columns = FIRST + tl.arange(0, WIDTH)
    inside = (rows[:, None] < row_total) & (columns[None, :] < D)
    return tl.load(matrix + rows[:, None] * D + columns[None, :], mask=inside, other=0.0).to(TYPE)


@triton.jit
def row_log_sum_exp_kernel(
    query, key, segment, rows, patches, row_lse,
    D: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, TYPE: tl.constexpr, SCALE: tl.constexpr,
    ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr,
):  # fmt: skip
    """λ = log Σ_j exp(scale · q·k_j) for ROW_TILE rows of one head, streaming over the keys with a running maximum."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    query += head * rows * D
    key += head * patches * D
    query_high = load_rows(query, row, rows, D, 0, HIGH, TYPE)
    if LOW > 0:
        query_low = load_rows(query, row, rows, D, HIGH, LOW, TYPE)
    if segment is not None:
        row_segment = tl.load(segment + row, mask=row < rows, other=-1)
    peak = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((ROW_TILE,), tl.float32)
    for start in range(0, patches, COLUMN_TILE):
        column = start + tl.arange(0, COLUMN_TILE)
        scores = tl.dot(query_high, tl.trans(load_rows(key, column, patches, D, 0, HIGH, TYPE)), input_precision="ieee")
        if LOW > 0:
            scores = tl.dot(query_low, tl.trans(load_rows(key, column, patches, D, HIGH, LOW, TYPE)), scores, input_precision="ieee")
        visible = column[None, :] < patches
        if segment is not None:
            visible &= row_segment[:, None] == tl.load(segment + column, mask=column < patches, other=-2)[None, :]
        scores = tl.where(visible, scores * (SCALE * LOG2_E), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen no key of its segment yet
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        peak = new_peak
    tl.store(row_lse + head * rows + row, (peak + tl.log2(total)) * LN_2, mask=row < rows)


@triton.jit
def masked_column_mean_kernel(
    query, key, row_lse, row_mask, segment, rows, patches, column_mean,
    D: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, TYPE: tl.constexpr, SCALE: tl.constexpr,
    ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr,
):  # fmt: skip
    """Σ_k m_k exp(scale · q_k·k_j − λ_k) / Σ_k m_k for COLUMN_TILE columns of one head; tiles without a masked row are skipped."""
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMN_TILE + tl.arange(0, COLUMN_TILE)
    query += head * rows * D
    key += head * patches * D
    row_lse += head * rows
    key_high = load_rows(key, column, patches, D, 0, HIGH, TYPE)
    if LOW > 0:
        key_low = load_rows(key, column, patches, D, HIGH, LOW, TYPE)
    if segment is not None:
        column_segment = tl.load(segment + column, mask=column < patches, other=-1)
    total = tl.zeros((COLUMN_TILE,), tl.float32)
    masked_rows = 0
    for start in range(0, rows, ROW_TILE):
        row = start + tl.arange(0, ROW_TILE)
        mask = tl.load(row_mask + row, mask=row < rows, other=0).to(tl.int32)
        found = tl.sum(mask, 0)
        if found > 0:
            scores = tl.dot(key_high, tl.trans(load_rows(query, row, rows, D, 0, HIGH, TYPE)), input_precision="ieee")
            if LOW > 0:
                scores = tl.dot(key_low, tl.trans(load_rows(query, row, rows, D, HIGH, LOW, TYPE)), scores, input_precision="ieee")
            lse = tl.load(row_lse + row, mask=row < rows, other=0.0)
            counts = mask[None, :] > 0
            if segment is not None:
                counts &= column_segment[:, None] == tl.load(segment + row, mask=row < rows, other=-2)[None, :]
            attention = tl.exp2(scores * (SCALE * LOG2_E) - (lse * LOG2_E)[None, :])
            total += tl.sum(tl.where(counts, attention, 0.0), 1)
            masked_rows += found
    tl.store(column_mean + head * patches + column, total / masked_rows, mask=column < patches)


def _constants(values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    # Shared memory stays under 48 KiB at two stages.
    row_tile, column_tile = (32, 32) if precision == "fp32" else (64, 64 if values["D"] <= MAX_WIDE_TILE else 32)
    return {**product_constants(values["D"], precision), "SCALE": values["scale"], "ROW_TILE": row_tile, "COLUMN_TILE": column_tile}


QUERY = ArgumentSpec("query", "T", ("H", "R", "D"))
KEY = ArgumentSpec("key", "T", ("H", "P", "D"))
SEGMENT = ArgumentSpec("segment", "int32", ("P",), optional=True)

ROW_LOG_SUM_EXP = KernelSpec(
    op="RowLogSumExp",
    kernel=row_log_sum_exp_kernel,
    inputs=(QUERY, KEY, SEGMENT),
    sizes={"rows": "R", "patches": "P"},
    outputs=(ArgumentSpec("row_lse", "float32", ("H", "R")),),
    grid=("(R + ROW_TILE - 1) // ROW_TILE", "H", "1"),
    constants=_constants,
    static=("D",),
    attributes=("scale",),
)
MASKED_COLUMN_MEAN = KernelSpec(
    op="MaskedColumnMean",
    kernel=masked_column_mean_kernel,
    inputs=(QUERY, KEY, ArgumentSpec("row_lse", "float32", ("H", "R")), ArgumentSpec("row_mask", "bool", ("R",)), SEGMENT),
    sizes={"rows": "R", "patches": "P"},
    outputs=(ArgumentSpec("column_mean", "float32", ("H", "P")),),
    grid=("(P + COLUMN_TILE - 1) // COLUMN_TILE", "H", "1"),
    constants=_constants,
    static=("D",),
    attributes=("scale",),
)
KERNELS = (ROW_LOG_SUM_EXP, MASKED_COLUMN_MEAN)
