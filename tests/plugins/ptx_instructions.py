"""What the instructions of emulated PTX do, but for matrices. Names and meanings: "Parallel Thread Execution ISA", section 9.

``compile_instruction`` turns one into a function of a block and a mask of its threads (None: all).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from ptx_machine import ATOMIC, WARP, Array, Block, EmulationError, register_type
from ptx_matrices import MATRIX_FORMS, half_floats
from ptx_operands import TYPES, Step, all_threads, read_address, read_operand, vector

__all__ = ["compile_instruction"]

COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def compile_instruction(parts: list[str], operands: Sequence[str]) -> Step:
    """What an instruction does, ``parts`` being its name without dots.

    Raises:
        KeyError, ValueError, IndexError: it is not emulated.
    """
    if parts[0] == "ld" and parts[1].startswith("param"):
        return _parameter(parts, operands)
    if parts[0] == "mov" and "{" in operands[0] + operands[1]:
        return _unpack(parts, operands) if operands[0].startswith("{") else _pack(parts, operands)
    return FORMS.get(parts[0], _arithmetic)(parts, operands)


def _parameter(parts: list[str], operands: Sequence[str]) -> Step:
    """A 32-bit parameter may be read into a wider register, its sign with it."""
    target, name, kind = operands[0], operands[1].strip("[] "), register_type(operands[0])
    if not np.can_cast(TYPES[parts[-1]], f"i{kind.itemsize}") and parts[-1] != f"b{8 * kind.itemsize}":
        raise ValueError(parts)
    return lambda block, mask: block.write(target, np.full(block.threads, block.parameters[name], f"i{kind.itemsize}"), mask)


def _load(parts: list[str], operands: Sequence[str]) -> Step:
    _check_space(parts)
    kind, registers = np.dtype(TYPES[parts[-1]]), vector(operands[0])
    width = kind.itemsize * len(registers)
    address = read_address(operands[1])

    def step(block: Block, mask: Array | None) -> None:
        lanes = block.lanes(mask)
        memory, places = block.memory(address(block)[lanes], width)
        values = memory.load(places, lanes, block).view(kind)
        for number, register in enumerate(registers):
            block.write_lanes(register, values[:, number], mask)

    return step


def _store(parts: list[str], operands: Sequence[str]) -> Step:
    _check_space(parts)
    kind = TYPES[parts[-1]]
    sources = [read_operand(register, kind) for register in vector(operands[1])]
    width = np.dtype(kind).itemsize * len(sources)
    address = read_address(operands[0])

    def step(block: Block, mask: Array | None) -> None:
        lanes = block.lanes(mask)
        memory, places = block.memory(address(block)[lanes], width)
        values = np.stack([source(block)[lanes] for source in sources], 1)
        memory.store(places, values.view(np.uint8), lanes, block)

    return step


def _check_space(parts: list[str]) -> None:
    if parts[1].partition(":")[0] not in ("global", "shared"):
        raise ValueError(parts)


def _atomic(parts: list[str], operands: Sequence[str]) -> Step:
    """The old value, which ``atom`` returns, is left out: its register keeps garbage."""
    combine, kind = {"add": np.add, "max": np.maximum}[parts[-2]], np.dtype(TYPES[parts[-1]])
    address, source = read_address(operands[-2]), read_operand(operands[-1], TYPES[parts[-1]])

    def step(block: Block, mask: Array | None) -> None:
        lanes = block.lanes(mask)
        memory, places = block.memory(address(block)[lanes], kind.itemsize)
        memory.check_store(places, ATOMIC, block)
        combine.at(memory.data.view(kind), places[:, 0] // kind.itemsize, source(block)[lanes])
        memory.mark_written(places, ATOMIC, block)

    return step


def _copy(parts: list[str], operands: Sequence[str]) -> Step:
    """cp.async, from global to shared memory: takes place when its group is waited for, and is seen by other threads after a barrier."""
    if parts[2] == "commit_group":

        def commit(block: Block, mask: Array | None) -> None:
            all_threads(mask)
            block.groups.append(block.copies)
            block.copies = []

        return commit
    if parts[2] == "wait_group":
        remaining = int(operands[0])

        def wait(block: Block, mask: Array | None) -> None:
            all_threads(mask)
            while len(block.groups) > remaining:
                for copy in block.groups.pop(0):
                    copy()

        return wait
    width = int(operands[2], 0)
    target, source, size = read_address(operands[0]), read_address(operands[1]), read_operand(operands[3] if len(operands) > 3 else operands[2], "u4")

    def step(block: Block, mask: Array | None) -> None:
        lanes, sizes = block.lanes(mask), size(block)[block.lanes(mask)]
        if ((sizes != 0) & (sizes != width)).any():
            raise EmulationError(f"a copy of a part of {width} bytes is not emulated")
        shared, targets = block.memory(target(block)[lanes], width)
        shared.check_store(targets, lanes[:, None], block)
        values = np.zeros(targets.shape, np.uint8)  # of a copy of size 0
        taken = sizes > 0
        given = block.memory(source(block)[lanes][taken], width) if taken.any() else None

        def copy() -> None:
            if given is not None:
                memory, places = given
                values[taken] = memory.load(places, lanes[taken], block)
            shared.store(targets, values, lanes, block)

        block.copies.append(copy)

    return step


def _elect(parts: list[str], operands: Sequence[str]) -> Step:
    """The first thread of a warp, and its number in all."""
    leader, chosen = operands[0].split("|")

    def step(block: Block, mask: Array | None) -> None:
        block.write(leader, np.zeros(block.threads, np.uint32), mask)
        block.write(chosen, block.thread % WARP == 0, mask)

    return step


def _reduce_warp(parts: list[str], operands: Sequence[str]) -> Step:
    kind = TYPES[parts[-1]]
    combine = {"add.s32": np.add, "max.s32": np.maximum, "max.f32": np.fmax}[".".join(parts[2:])]  # NaN counts only where there is nothing else
    source = read_operand(operands[1], kind)
    return lambda block, mask: block.write(operands[0], np.repeat(combine.reduce(source(block).reshape(-1, WARP), 1, kind), WARP), mask)


def _shuffle(parts: list[str], operands: Sequence[str]) -> Step:
    """A lane takes its partner's value, or keeps its own where there is no partner. Warps are not divided into smaller segments."""
    mode, limit, lane = parts[2], int(operands[3]), np.arange(WARP)
    if (mode, limit) not in {("up", 0), ("bfly", 31), ("idx", 31)} or operands[4] != "-1":
        raise ValueError(operands)
    partners: dict[str, Callable[[Array], Array]] = {
        "up": lambda by: np.where(lane >= by, lane - by, lane), "bfly": lambda by: lane ^ by, "idx": lambda by: by & 31,
    }  # fmt: skip
    source, distance, partner = read_operand(operands[1], "u4"), read_operand(operands[2], "i4"), partners[mode]

    def step(block: Block, mask: Array | None) -> None:
        values = np.take_along_axis(source(block).reshape(-1, WARP), partner(distance(block).reshape(-1, WARP)), 1)
        block.write(operands[0], values.reshape(-1), mask)

    return step


def _unpack(parts: list[str], operands: Sequence[str]) -> Step:
    """mov from a register to several smaller ones."""
    kind, registers = np.dtype(TYPES[parts[1]]), vector(operands[0])
    source = read_operand(operands[1], TYPES[parts[1]])

    def step(block: Block, mask: Array | None) -> None:
        values = np.ascontiguousarray(source(block)).view(f"u{kind.itemsize // len(registers)}").reshape(block.threads, -1)
        for number, register in enumerate(registers):
            block.write(register, values[:, number], mask)

    return step


def _pack(parts: list[str], operands: Sequence[str]) -> Step:
    members, kind = vector(operands[1]), np.dtype(TYPES[parts[1]])
    sources = [read_operand(member, f"u{kind.itemsize // len(members)}") for member in members]
    return lambda block, mask: block.write(operands[0], np.stack([source(block) for source in sources], 1).view(kind).reshape(-1), mask)


def _convert(parts: list[str], operands: Sequence[str]) -> Step:
    *rounding, to, of = parts[1:]
    target, given = operands[0], operands[1:]
    if of in ("f16", "bf16") and to == "f32":
        bits = read_operand(given[0], "u2")
        return lambda block, mask: block.write(target, half_floats(bits(block), of), mask)
    sources = [read_operand(operand, TYPES[of]) for operand in given]
    if to in ("f16", "bf16") and (rounding, of) == (["rn"], "f32"):
        return lambda block, mask: block.write(target, _to_half(sources[0](block), to).astype(np.uint16), mask)
    if to in ("f16x2", "bf16x2") and (rounding, of) == (["rn"], "f32"):  # the first operand is the upper half
        return lambda block, mask: block.write(target, _to_half(sources[0](block), to[:-2]) << 16 | _to_half(sources[1](block), to[:-2]), mask)
    if rounding and (rounding, to, of) not in ((["rn"], "f32", "s32"), (["rzi"], "s32", "f32")):
        raise ValueError(parts)
    kind = TYPES[to]
    return lambda block, mask: block.write(target, sources[0](block).astype(kind), mask)


def _to_half(values: Array, kind: str) -> Array:
    """float32 rounded to nearest, ties to even: 16 bits in uint32."""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)
    bits = values.view(np.uint32)
    return np.where(np.isnan(values), np.uint32(0x7FFF), bits + 0x7FFF + (bits >> 16 & 1) >> 16)


def _in_float64(function: Callable[..., Array]) -> Callable[..., Array]:
    """Rounded to float32 once."""
    return lambda *values: function(*(value.astype(np.float64) for value in values)).astype(np.float32)


def _wide(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: function(a.astype(f"{a.dtype.kind}8"), b.astype(f"{b.dtype.kind}8"))


def _upper_half(left: Array, right: Array) -> Array:
    """mul.hi: products of twice as many bits, in Python's integers."""
    return (left.astype(object) * right.astype(object) >> 8 * left.dtype.itemsize).astype(left.dtype)


def _permute(first: Array, second: Array, selector: Array) -> Array:
    """prmt: four bytes out of eight."""
    both = np.ascontiguousarray(np.stack([first, second], 1)).view(np.uint8)
    digits = [selector >> 4 * number & 0xF for number in range(4)]
    if (np.stack(digits) > 7).any():
        raise EmulationError("copies of signs are not emulated")
    return np.stack([both[np.arange(len(both)), digit] for digit in digits], 1).view(np.uint32).reshape(-1)


INTEGER: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "neg": np.negative, "mov": np.array, "popc": np.bitwise_count,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "prmt": _permute,
    "mul.lo": np.multiply, "mul.wide": _wide(np.multiply), "mul.hi": _upper_half, "mad.lo": lambda a, b, c: a * b + c,
}  # fmt: skip
FLOAT: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "min": np.fmin, "max": np.fmax, "neg": np.negative, "mov": np.array, "mul": np.multiply,
    "fma.rn": _in_float64(lambda a, b, c: a * b + c), "fma.rn.ftz": _in_float64(lambda a, b, c: a * b + c),
    "div.full": np.divide, "div.approx": np.divide, "ex2.approx.ftz": _in_float64(np.exp2),
}  # fmt: skip


def _arithmetic(parts: list[str], operands: Sequence[str]) -> Step:
    """One value a thread from one to three."""
    target, given, operation = operands[0], operands[1:], ".".join(parts[:-1])
    if parts[-1] == "f32x2":  # two in 64 bits
        packed, function = [read_operand(operand, "u8") for operand in given], FLOAT[operation]
        return lambda block, mask: block.write(target, function(*(np.array(x(block)).view(np.float32) for x in packed)).view(np.uint64), mask)
    sources = [read_operand(operand, TYPES[parts[-1]]) for operand in given]
    function, kind = (FLOAT if parts[-1] == "f32" else INTEGER)[operation], register_type(target)

    def step(block: Block, mask: Array | None) -> None:
        result = function(*(source(block) for source in sources))
        block.write(target, result if result.dtype.itemsize == kind.itemsize else result.astype(kind), mask)

    return step


def _compare(parts: list[str], operands: Sequence[str]) -> Step:
    compare, (left, right) = COMPARISONS[parts[1]], (read_operand(operand, TYPES[parts[2]]) for operand in operands[1:])
    return lambda block, mask: block.write(operands[0], compare(left(block), right(block)), mask)


def _select(parts: list[str], operands: Sequence[str]) -> Step:
    (yes, no), choice = (read_operand(operand, TYPES[parts[1]]) for operand in operands[1:3]), read_operand(operands[3], "?")
    return lambda block, mask: block.write(operands[0], np.where(choice(block), yes(block), no(block)), mask)


def _shift(parts: list[str], operands: Sequence[str]) -> Step:
    """By as many bits as there are, or more: nothing is left, or the sign."""
    source, distance, left = read_operand(operands[1], TYPES[parts[1]]), read_operand(operands[2], "u4"), parts[0] == "shl"

    def step(block: Block, mask: Array | None) -> None:
        value, by = source(block), distance(block)
        bits = 8 * value.dtype.itemsize
        limited = np.minimum(by, bits - 1).astype(value.dtype)
        shifted = value << limited if left else value >> limited
        block.write(operands[0], np.where((by >= bits) & (left or value.dtype.kind == "u"), value.dtype.type(0), shifted), mask)

    return step


def _extract_bits(parts: list[str], operands: Sequence[str]) -> Step:
    """bfe: ``length`` bits from ``first`` on, with their sign or without."""
    source, first, length = read_operand(operands[1], "u4"), int(operands[2]), int(operands[3])
    if parts[1] not in ("u32", "s32") or first + length > 32:
        raise ValueError(operands)

    def step(block: Block, mask: Array | None) -> None:
        top = source(block) << np.uint32(32 - first - length)
        block.write(operands[0], (top.view(np.int32) if parts[1] == "s32" else top) >> (32 - length), mask)

    return step


def _multiply_wide_add(parts: list[str], operands: Sequence[str]) -> Step:
    """mad: products of 32 bits in 64, or as many bits as the operands have."""
    if parts[1] == "lo":
        return _arithmetic(parts, operands)
    (left, right), added = (read_operand(operand, TYPES[parts[2]]) for operand in operands[1:3]), read_operand(operands[3], "u8")
    multiply = _wide(np.multiply)
    return lambda block, mask: block.write(operands[0], multiply(left(block), right(block)).view(np.uint64) + added(block), mask)


FORMS: dict[str, Callable[[list[str], Sequence[str]], Step]] = MATRIX_FORMS | {
    "ld": _load, "st": _store, "red": _atomic, "atom": _atomic, "cp": _copy, "elect": _elect, "redux": _reduce_warp, "shfl": _shuffle,
    "cvt": _convert, "setp": _compare, "selp": _select, "shl": _shift, "shr": _shift, "bfe": _extract_bits, "mad": _multiply_wide_add,
}  # fmt: skip
