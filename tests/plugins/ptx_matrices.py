"""The instructions of emulated PTX that work on small matrices spread over the threads of a warp, or of four: 9.7.14 and 9.7.15."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from ptx_machine import MANY, WARP, Array, Block, Memory
from ptx_operands import Step, all_threads, read_address, read_operand, vector

__all__ = ["MATRIX_FORMS", "half_floats", "read_swizzled"]

SWIZZLES = {2: 3, 4: 2, 6: 1}  # a descriptor's mode, of wgmma and tcgen05 alike → log₂ of the 16-byte pieces that are swapped


def _matrix_rows(parts: list[str], address: str) -> Callable[[Block, Array | None, int], tuple[Memory, Array]]:
    """Where matrix ``number`` of each warp lies: its memory, and the places of its 8 rows of 16 bytes [8 warps, 16]."""
    if parts[3] != "m8n8" or parts[5:] != ["shared", "b16"]:
        raise ValueError(parts)
    source = read_address(address)

    def rows(block: Block, mask: Array | None, number: int) -> tuple[Memory, Array]:
        lanes = block.lanes(mask).reshape(-1, WARP)
        return block.memory(source(block)[lanes[:, 8 * number : 8 * number + 8].ravel()], 16)

    return rows


def _load_matrix(parts: list[str], operands: Sequence[str]) -> Step:
    """8×8 matrices of 16-bit elements: threads 8i to 8i + 7 say where rows lie, thread l gets elements 2 (l % 4) and + 1 of row l / 4."""
    registers, rows = vector(operands[0]), _matrix_rows(parts, operands[1])

    def step(block: Block, mask: Array | None) -> None:
        for number, register in enumerate(registers):
            memory, places = rows(block, mask, number)
            block.write_lanes(register, memory.load(places, np.full(len(places), MANY), block).view(np.uint32).ravel(), mask)

    return step


def _store_matrix(parts: list[str], operands: Sequence[str]) -> Step:
    rows, registers = _matrix_rows(parts, operands[0]), vector(operands[1])

    def step(block: Block, mask: Array | None) -> None:
        for number, register in enumerate(registers):
            memory, places = rows(block, mask, number)
            lanes = block.lanes(mask)
            memory.store(places.reshape(-1, 4), block.read(register)[lanes, None].view(np.uint8), lanes, block)

    return step


def half_floats(bits: Array, kind: str) -> Array:
    """16 bits, of a float16 or bfloat16, as float32."""
    return bits.view(np.float16).astype(np.float32) if kind == "f16" else (bits.astype(np.uint32) << 16).view(np.float32)


def _multiply_fragments(parts: list[str], operands: Sequence[str]) -> Step:
    """mma: D = A B + C of a warp, A [16, 16], B [16, 8], C and D [16, 8] in float32."""
    kind = parts[7]
    if parts[1:7] != ["sync", "aligned", "m16n8k16", "row", "col", "f32"] or kind not in ("f16", "bf16"):
        raise ValueError(parts)
    results, left, right, added = (vector(operand) for operand in operands)
    sums = [read_operand(register, "f4") for register in added]
    group, member = np.arange(WARP) // 4, np.arange(WARP) % 4

    def step(block: Block, mask: Array | None) -> None:
        warps = block.threads // WARP

        def halves(register: str) -> Array:
            return half_floats(block.read(register).view(np.uint16), kind).reshape(warps, WARP, 2)

        a, b, c = (np.zeros((warps, *shape), np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
        for half in (0, 1):
            for number, register in enumerate(left):
                a[:, group + 8 * (number % 2), 2 * member + half + 8 * (number // 2)] = halves(register)[:, :, half]
            for number, register in enumerate(right):
                b[:, 2 * member + half + 8 * number, group] = halves(register)[:, :, half]
        places = [(group + 8 * (number // 2), 2 * member + number % 2) for number in range(4)]
        for (row, column), value in zip(places, sums, strict=True):
            c[:, row, column] = value(block).reshape(warps, WARP)
        d = a @ b + c
        for (row, column), register in zip(places, results, strict=True):
            block.write(register, d[:, row, column].reshape(-1), mask)

    return step


def read_swizzled(block: Block, descriptor: int, rows: int, *, waited_for: bool = False) -> Array:
    """A matrix [rows, 16] of 16-bit elements in shared memory: rows of 2^bits pieces of 16 bytes, which are swapped by the number of the row."""
    bits = SWIZZLES[descriptor >> 61]
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4  # of 8 rows to the next
    row = np.arange(rows)[:, None]
    address = start + row // 8 * stride + row % 8 * (16 << bits) + np.array([0, 16])
    address ^= (address >> 7 & (1 << bits) - 1) << 4
    memory, places = block.memory(address.ravel(), 16)
    return memory.load(places, np.full(len(places), MANY), block, waited_for=waited_for).view(np.uint16).reshape(rows, 16)


def _multiply_shared(parts: list[str], operands: Sequence[str]) -> Step:
    """wgmma: D = A Bᵀ + D of four warps, A [64, 16] and B [N, 16] in swizzled shared memory. Done at once; fences and waiting do nothing."""
    if parts[1] != "mma_async":
        return lambda block, mask: None
    shape = re.fullmatch(r"m64n(\d+)k16", parts[4])
    kind = parts[6]
    if shape is None or parts[5] != "f32" or kind not in ("f16", "bf16") or list(operands[4:]) != ["1", "1", "0", "0"]:
        raise ValueError(parts)
    results, left, right, adds = vector(operands[0]), read_operand(operands[1], "u8"), read_operand(operands[2], "u8"), read_operand(operands[3], "?")
    size, lane = int(shape.group(1)), np.arange(WARP)

    def matrix(block: Block, descriptor: int, rows: int) -> Array:
        return half_floats(read_swizzled(block, descriptor, rows), kind)

    def step(block: Block, mask: Array | None) -> None:
        all_threads(mask)
        products = [
            matrix(block, int(left(block)[first]), 64) @ matrix(block, int(right(block)[first]), size).T
            for first in range(0, block.threads, 4 * WARP)
        ]
        for number, register in enumerate(results):
            row = 16 * np.arange(4)[:, None] + lane // 4 + 8 * (number // 2 % 2)
            values = np.concatenate([product[row, 8 * (number // 4) + 2 * (lane % 4) + number % 2].ravel() for product in products])
            block.write(register, np.where(adds(block), values + block.read(register).view(np.float32), values), mask)

    return step


MATRIX_FORMS: dict[str, Callable[[list[str], Sequence[str]], Step]] = {
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
    "mma": _multiply_fragments,
    "wgmma": _multiply_shared,
}
