"""Blackwell's tensor memory in emulated PTX (tcgen05 and the barriers in memory that it completes): what "Parallel Thread Execution ISA" 9.7.16 says.

A product is taken when the barrier to which it was committed is waited for, no sooner: operands that are overwritten before, or results that
are read, come out wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from ptx_machine import GARBAGE, WARP, Array, Block, EmulationError
from ptx_matrices import half_floats, read_swizzled
from ptx_operands import Step, read_address, read_operand, vector

__all__ = ["WAIT", "compile_tensor_memory", "must_wait", "one_wait"]

WAIT = "mbarrier.wait"  # one instruction in place of the loop that compilers write
NOTHING = ("dealloc", "relinquish_alloc_permit", "wait", "fence")
WAIT_LOOP = re.compile(
    r"\{\s*\.reg\s+\.pred\s+complete;\s*"
    r"waitLoop:\s*mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, ([^;]*);\s*@!complete bra\.uni waitLoop;\s*\}"
)


def one_wait(body: str) -> str:
    """A program with ``WAIT`` in place of loops that try until a barrier's phase is complete."""
    return WAIT_LOOP.sub(rf"{WAIT} \1;", body)


def must_wait(operands: Sequence[str]) -> Callable[[Block], Array]:
    """Which threads a ``WAIT`` holds up: those whose barrier has not completed the phase of this parity."""
    address, parity = read_address(operands[0]), read_operand(operands[1], "u4")

    def holds(block: Block) -> Array:
        phases = np.array([block.phases.get(int(place), 0) for place in address(block)])
        held: Array = phases & 1 == parity(block)
        return held

    return holds


def compile_tensor_memory(parts: list[str], operands: Sequence[str]) -> Step:
    """What an instruction on tensor memory or a barrier in memory does.

    Raises:
        KeyError, ValueError, IndexError: it is not emulated.
    """
    kind = parts[1].partition(":")[0]
    if parts[0] == "mbarrier":
        return {"init": _start, "inval": _nothing, "wait": _wait}[kind](operands)
    if kind in NOTHING:
        return _nothing(operands)
    return {"alloc": _allocate, "mma": _multiply, "commit": _commit, "ld": _load, "st": _store}[kind](parts, operands)


def _nothing(operands: Sequence[str]) -> Step:
    return lambda block, mask: None


def _start(operands: Sequence[str]) -> Step:
    address = read_address(operands[0])
    if operands[1] != "1":
        raise ValueError(operands)

    def step(block: Block, mask: Array | None) -> None:
        for lane in block.lanes(mask):
            block.phases[int(address(block)[lane])] = 0

    return step


def _wait(operands: Sequence[str]) -> Step:
    address = read_address(operands[0])

    def step(block: Block, mask: Array | None) -> None:
        for place in np.unique(address(block)[block.lanes(mask)]):
            for product in block.committed.pop(int(place), []):
                product()

    return step


def _allocate(parts: list[str], operands: Sequence[str]) -> Step:
    """Always the first columns: a block has one allocation here."""
    address, columns = read_address(operands[0]), int(operands[1])

    def step(block: Block, mask: Array | None) -> None:
        if block.tensor_memory.size:
            raise EmulationError("a second allocation is not emulated")
        block.tensor_memory = np.full((4 * WARP, 4 * columns), GARBAGE, np.uint8).view(np.uint32)
        lane = block.lanes(mask)[:1]
        memory, places = block.memory(address(block)[lane], 4)
        memory.store(places, np.zeros((1, 4), np.uint8), lane, block)

    return step


def _multiply(parts: list[str], operands: Sequence[str]) -> Step:
    """D = A Bᵀ + D, A [M, 16] and B [N, 16] in swizzled shared memory, D [M, N] float32 in tensor memory; of 64 rows a warp has 16."""
    if parts[2:] != ["cta_group:1", "kind:f16"]:
        raise ValueError(parts)
    target, adds = read_address(operands[0]), read_operand(operands[4], "?")
    left, right, shape = read_operand(operands[1], "u8"), read_operand(operands[2], "u8"), read_operand(operands[3], "u4")

    def step(block: Block, mask: Array | None) -> None:
        (lane,) = block.lanes(mask)
        form = int(shape(block)[lane])
        rows, columns, types = form >> 24 << 4 & 0x1FF, (form >> 17 & 0x3F) << 3, (form >> 4 & 3, form >> 7 & 7, form >> 10 & 7, form >> 15 & 3)
        if rows not in (64, 128) or types not in ((1, 0, 0, 0), (1, 1, 1, 0)):
            raise EmulationError(f"products of the form {form:#x} are not emulated")
        kind = "bf16" if types[1] else "f16"
        first, keeps, place = int(target(block)[lane]), bool(adds(block)[lane]), np.arange(rows)
        descriptors = [(int(operand(block)[lane]), count) for operand, count in ((left, rows), (right, columns))]

        def operands_now() -> list[Array]:
            read = [read_swizzled(block, *matrix, waited_for=True) for matrix in descriptors]
            return [half_floats(bits, kind) for bits in read]

        def product() -> None:
            a, b = operands_now()
            tensor_lane = place if rows == 4 * WARP else place // 16 * WARP + place % 16
            held = block.tensor_memory[tensor_lane, first : first + columns].view(np.float32)
            block.tensor_memory[tensor_lane, first : first + columns] = (a @ b.T + (held if keeps else 0)).astype(np.float32).view(np.uint32)

        operands_now()  # they must be there already
        block.products.append(product)

    return step


def _commit(parts: list[str], operands: Sequence[str]) -> Step:
    address = read_address(operands[0])

    def step(block: Block, mask: Array | None) -> None:
        (lane,) = block.lanes(mask)
        barrier = int(address(block)[lane])
        block.committed.setdefault(barrier, []).extend(block.products)
        block.products.clear()
        block.phases[barrier] += 1

    return step


def _places(parts: list[str], address: str, halves: Sequence[str], count: int) -> Callable[[Block, Array], tuple[Array, Array]]:
    """Lane and column of each of ``count`` registers [threads, count]: a thread has a lane, or two threads share one and its columns."""
    base = read_address(address)
    if parts[4] not in ("32x32b", "16x32bx2") or parts[5] != f"x{count}":
        raise ValueError(parts)
    split = int(halves[0]) if halves else 0

    def places(block: Block, threads: Array) -> tuple[Array, Array]:
        start, lane = base(block)[threads], threads % WARP
        column = (start & 0xFFFF)[:, None] + np.arange(count)
        if halves:
            column, lane = column + np.where(lane < 16, 0, split)[:, None], lane % 16
        return ((start >> 16) + lane)[:, None], column

    return places


def _load(parts: list[str], operands: Sequence[str]) -> Step:
    registers = vector(operands[0])
    places = _places(parts, operands[1], operands[2:], len(registers))

    def step(block: Block, mask: Array | None) -> None:
        values = block.tensor_memory[places(block, block.lanes(mask))]
        for number, register in enumerate(registers):
            block.write_lanes(register, values[:, number], mask)

    return step


def _store(parts: list[str], operands: Sequence[str]) -> Step:
    registers = vector(operands[-1])
    places = _places(parts, operands[0], operands[1:-1], len(registers))

    def step(block: Block, mask: Array | None) -> None:
        lanes = block.lanes(mask)
        block.tensor_memory[places(block, lanes)] = np.stack([block.read(register)[lanes] for register in registers], 1)

    return step
