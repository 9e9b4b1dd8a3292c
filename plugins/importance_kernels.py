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

__all__ = ["KERNELS", "MASKED_COLUMN_MEAN", "ROW_LOG_SUM_EXP", "add_keys", "dot_rows", "load_parts", "product_constants"]

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
def load_rows(matrix, rows, row_total, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, INSIDE: tl.constexpr = False):
    """Columns FIRST … FIRST + WIDTH of some rows of a matrix [row_total, D]; zeros outside. INSIDE: all rows exist. → TYPE [rows, WIDTH]"""
    columns = FIRST + tl.arange(0, WIDTH)
    address = matrix + rows[:, None] * D + columns[None, :]
    if FIRST + WIDTH <= D:
        if INSIDE:
            return tl.load(address).to(TYPE)
        return tl.load(address, mask=rows[:, None] < row_total, other=0.0).to(TYPE)
    if INSIDE:
        return tl.load(address, mask=columns[None, :] < D, other=0.0).to(TYPE)
    return tl.load(address, mask=(rows[:, None] < row_total) & (columns[None, :] < D), other=0.0).to(TYPE)


@triton.jit
def load_parts(matrix, rows, row_total, D: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, TYPE: tl.constexpr):
    """Rows of a matrix [row_total, D] in two parts; the second is the first again where there is none. → TYPE [rows, HIGH], [rows, LOW]"""
    high = load_rows(matrix, rows, row_total, D, 0, HIGH, TYPE)
    low = high
    if LOW > 0:
        low = load_rows(matrix, rows, row_total, D, HIGH, LOW, TYPE)
    return high, low


@triton.jit
def dot_rows(
    high, low, matrix, rows, row_total, D: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, TYPE: tl.constexpr, INSIDE: tl.constexpr = False
):
    """Products of rows in two parts with rows of a matrix [row_total, D]. → float32 [rows of high, rows]"""
    product = tl.dot(high, tl.trans(load_rows(matrix, rows, row_total, D, 0, HIGH, TYPE, INSIDE)), input_precision="ieee")
    if LOW > 0:
        product = tl.dot(low, tl.trans(load_rows(matrix, rows, row_total, D, HIGH, LOW, TYPE, INSIDE)), product, input_precision="ieee")
    return product


@triton.jit
def add_keys(peak, total, scores, SCALE: tl.constexpr):
    """More scores for the running maximum and the sum of exponentials under it. → both, float32 [rows]"""
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen no key of its segment yet
    # The difference first: a fused multiply-add of two rounded products would not be 0 where the peak stays, and would add up over the keys.
    total = total * tl.exp2((peak - base) * SCALE) + tl.sum(tl.exp2(scores * SCALE - (base * SCALE)[:, None]), 1)
    return new_peak, total


@triton.jit
def row_log_sum_exp_kernel(
    query, key, segment, rows, patches, row_lse,
    D: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, TYPE: tl.constexpr, SCALE: tl.constexpr,
    ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr,
):  # fmt: skip
    """λ = log Σ_j exp(scale · q·k_j) for ROW_TILE rows of one head, streaming over the keys with a running maximum; scale > 0."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    query += head * rows * D
    key += head * patches * D
    query_high, query_low = load_parts(query, row, rows, D, HIGH, LOW, TYPE)
    if segment is not None:
        row_segment = tl.load(segment + row, mask=row < rows, other=-1)
    peak = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((ROW_TILE,), tl.float32)
    whole = patches // COLUMN_TILE * COLUMN_TILE
    for start in range(0, whole, COLUMN_TILE):
        column = start + tl.arange(0, COLUMN_TILE)
        scores = dot_rows(query_high, query_low, key, column, patches, D, HIGH, LOW, TYPE, INSIDE=True)
        if segment is not None:
            scores = tl.where(row_segment[:, None] == tl.load(segment + column)[None, :], scores, float("-inf"))
        peak, total = add_keys(peak, total, scores, SCALE * LOG2_E)
    if whole < patches:
        column = whole + tl.arange(0, COLUMN_TILE)
        scores = dot_rows(query_high, query_low, key, column, patches, D, HIGH, LOW, TYPE)
        visible = column[None, :] < patches
        if segment is not None:
            visible &= row_segment[:, None] == tl.load(segment + column, mask=column < patches, other=-2)[None, :]
        peak, total = add_keys(peak, total, tl.where(visible, scores, float("-inf")), SCALE * LOG2_E)
    tl.store(row_lse + head * rows + row, (peak * (SCALE * LOG2_E) + tl.log2(total)) * LN_2, mask=row < rows)


@triton.jit
def _masked_rows(row_mask, rows, SCAN_TILE: tl.constexpr):
    """How many rows are masked, and behind the last of them."""
    count = 0
    end = 0
    for start in range(0, rows, SCAN_TILE):
        row = start + tl.arange(0, SCAN_TILE)
        mask = tl.load(row_mask + row, mask=row < rows, other=0).to(tl.int32)
        count += tl.sum(mask, 0)
        end = tl.maximum(end, tl.max(mask * (row + 1), 0))
    return count, end


@triton.jit
def masked_column_mean_kernel(
    query, key, row_lse, row_mask, segment, rows, patches, column_mean,
    D: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, TYPE: tl.constexpr, SCALE: tl.constexpr,
    ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr, SCAN_TILE: tl.constexpr,
):  # fmt: skip
    """Σ_k m_k exp(scale · q_k·k_j − λ_k) / Σ_k m_k for COLUMN_TILE columns of one head; nothing is computed behind the last masked row."""
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMN_TILE + tl.arange(0, COLUMN_TILE)
    query += head * rows * D
    key += head * patches * D
    row_lse += head * rows
    key_high, key_low = load_parts(key, column, patches, D, HIGH, LOW, TYPE)
    if segment is not None:
        column_segment = tl.load(segment + column, mask=column < patches, other=-1)
    masked_rows, end = _masked_rows(row_mask, rows, SCAN_TILE)
    total = tl.zeros((COLUMN_TILE,), tl.float32)
    for start in range(0, end, ROW_TILE):
        row = start + tl.arange(0, ROW_TILE)
        scores = dot_rows(key_high, key_low, query, row, rows, D, HIGH, LOW, TYPE)
        counts = tl.load(row_mask + row, mask=row < rows, other=0) != 0
        lse = tl.load(row_lse + row, mask=row < rows, other=0.0)
        base = tl.where(counts, lse * LOG2_E, float("inf"))  # exp2(−inf) is 0
        attention = tl.exp2(scores * (SCALE * LOG2_E) - base[None, :])
        if segment is not None:
            same = column_segment[:, None] == tl.load(segment + row, mask=row < rows, other=-2)[None, :]
            attention = tl.where(same, attention, 0.0)
        total += tl.sum(attention, 1)
    tl.store(column_mean + head * patches + column, total / masked_rows, mask=column < patches)


def _constants(values: Mapping[str, Any], precision: str, wide: tuple[int, int], narrow: tuple[int, int]) -> dict[str, Any]:
    """Tiles of rows and columns: fastest on an H200 (docs/benchmarks.md) of those that stay under 48 KiB of shared memory."""
    row_tile, column_tile = (32, 32) if precision == "fp32" else wide if values["D"] <= MAX_WIDE_TILE else narrow
    return {**product_constants(values["D"], precision), "SCALE": values["scale"], "ROW_TILE": row_tile, "COLUMN_TILE": column_tile}


def _row_constants(values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    return _constants(values, precision, (64, 64), (64, 32))


def _column_constants(values: Mapping[str, Any], precision: str) -> dict[str, Any]:
    return {**_constants(values, precision, (64, 128), (32, 64)), "SCAN_TILE": 1024}


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
    constants=_row_constants,
    static=("D",),
    attributes=("scale",),
    num_stages=3,
)
MASKED_COLUMN_MEAN = KernelSpec(
    op="MaskedColumnMean",
    kernel=masked_column_mean_kernel,
    inputs=(QUERY, KEY, ArgumentSpec("row_lse", "float32", ("H", "R")), ArgumentSpec("row_mask", "bool", ("R",)), SEGMENT),
    sizes={"rows": "R", "patches": "P"},
    outputs=(ArgumentSpec("column_mean", "float32", ("H", "P")),),
    grid=("(P + COLUMN_TILE - 1) // COLUMN_TILE", "H", "1"),
    constants=_column_constants,
    static=("D",),
    attributes=("scale",),
)
KERNELS = (ROW_LOG_SUM_EXP, MASKED_COLUMN_MEAN)
