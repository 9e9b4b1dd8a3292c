"""What the instructions of emulated PTX do. Names and meanings: "Parallel Thread Execution ISA", section 9; matrix fragments 9.7.14 and 9.7.15.

``compile_instruction`` turns one into a function of a block and a mask of its threads (None: all).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from ptx_machine import ATOMIC, MANY, SHARED_BASE, WARP, Array, Block, EmulationError, Memory, register_type

__all__ = ["Step", "compile_instruction", "half_floats", "read_address", "read_operand", "read_swizzled", "vector"]

Step = Callable[[Block, Array | None], None]
Source = Callable[[Block], Array]

TYPES = {
    "pred": "?", "b8": "u1", "b16": "u2", "u16": "u2", "s16": "i2", "b32": "u4", "u32": "u4", "s32": "i4", "b64": "u8", "u64": "u8", "s64": "i8",
    "f32": "f4",
}  # fmt: skip
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


def read_operand(text: str, kind: str) -> Source:
    """How to read an operand as a NumPy type, one value a thread."""
    dtype = np.dtype(kind)
    if special := re.fullmatch(r"%(tid|ctaid)\.([xyz])", text):
        axis = "xyz".index(special.group(2))
        if special.group(1) == "ctaid":
            return lambda block: np.full(block.threads, block.index[axis], np.uint32).view(dtype)
        return lambda block: block.thread.view(dtype) if axis == 0 else np.zeros(block.threads, dtype)
    if text.startswith("%"):
        if register_type(text).itemsize == dtype.itemsize:
            return lambda block: block.read(text).view(dtype)
        narrow = f"u{dtype.itemsize}"  # a store or a conversion may take the lower bits of a wider register
        return lambda block: block.read(text).astype(narrow).view(dtype)
    constant = np.array(_literal(text) & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}").view(dtype) if kind != "?" else np.array(text != "0")
    return lambda block: np.broadcast_to(constant, block.threads)


def _literal(text: str) -> int:
    if text.startswith("0f"):  # the bits of a float32
        return int(text[2:], 16)
    if text.startswith("global_smem"):
        return SHARED_BASE
    return int(text.rstrip("U"), 0)


def vector(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{} ").split(",")]


def read_address(text: str) -> Source:
    """``[register + offset]``."""
    match = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
    if match is None:
        raise ValueError(text)
    base, offset = match.group(1), int(match.group(2) or 0)
    source = read_operand(base, "u8" if base.startswith("%rd") else "u4")
    return lambda block: source(block).astype(np.int64) + offset


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
            result = np.zeros(block.threads, register_type(register))
            result[lanes] = values[:, number]
            block.write(register, result, mask)

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
            _all_threads(mask)
            block.groups.append(block.copies)
            block.copies = []

        return commit
    if parts[2] == "wait_group":
        remaining = int(operands[0])

        def wait(block: Block, mask: Array | None) -> None:
            _all_threads(mask)
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


def _all_threads(mask: Array | None) -> None:
    if mask is not None:
        raise EmulationError("by a part of a block it is not emulated")


def _matrix_rows(block: Block, mask: Array | None, address: Source, number: int) -> tuple[Memory, Array, Array]:
    """Matrix ``number`` of each warp: its memory, the places of its 8 rows of 16 bytes [8 warps, 16], and the threads [warps, 32]."""
    lanes = block.lanes(mask).reshape(-1, WARP)
    memory, places = block.memory(address(block)[lanes[:, 8 * number : 8 * number + 8].ravel()], 16)
    return memory, places, lanes


def _load_matrix(parts: list[str], operands: Sequence[str]) -> Step:
    """8×8 matrices of 16-bit elements: threads 8i to 8i + 7 say where rows lie, thread l gets elements 2 (l % 4) and + 1 of row l / 4."""
    registers, address = vector(operands[0]), read_address(operands[1])
    if parts[3] != "m8n8" or parts[5:] != ["shared", "b16"]:
        raise ValueError(parts)

    def step(block: Block, mask: Array | None) -> None:
        for number, register in enumerate(registers):
            memory, places, lanes = _matrix_rows(block, mask, address, number)
            result = np.zeros(block.threads, np.uint32)
            result[lanes] = memory.load(places, np.full(len(places), MANY), block).view(np.uint32).reshape(-1, WARP)
            block.write(register, result, mask)

    return step


def _store_matrix(parts: list[str], operands: Sequence[str]) -> Step:
    address, registers = read_address(operands[0]), vector(operands[1])
    if parts[3] != "m8n8" or parts[5:] != ["shared", "b16"]:
        raise ValueError(parts)

    def step(block: Block, mask: Array | None) -> None:
        for number, register in enumerate(registers):
            memory, places, lanes = _matrix_rows(block, mask, address, number)
            values = block.read(register)[lanes].reshape(-1, 1).view(np.uint8)
            memory.store(places.reshape(-1, 4), values, lanes.ravel(), block)

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


def read_swizzled(block: Block, descriptor: int, rows: int, bits: int, *, waited_for: bool = False) -> Array:
    """A matrix [rows, 16] of 16-bit elements in shared memory: rows of 2^bits pieces of 16 bytes, which are swapped by the number of the row."""
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
        return half_floats(read_swizzled(block, descriptor, rows, {1: 3, 2: 2, 3: 1}[descriptor >> 62]), kind)

    def step(block: Block, mask: Array | None) -> None:
        _all_threads(mask)
        products = [
            matrix(block, int(left(block)[first]), 64) @ matrix(block, int(right(block)[first]), size).T
            for first in range(0, block.threads, 4 * WARP)
        ]
        for number, register in enumerate(results):
            row = 16 * np.arange(4)[:, None] + lane // 4 + 8 * (number // 2 % 2)
            values = np.concatenate([product[row, 8 * (number // 4) + 2 * (lane % 4) + number % 2].ravel() for product in products])
            block.write(register, np.where(adds(block), values + block.read(register).view(np.float32), values), mask)

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


FORMS: dict[str, Callable[[list[str], Sequence[str]], Step]] = {
    "ld": _load, "st": _store, "red": _atomic, "atom": _atomic, "cp": _copy, "ldmatrix": _load_matrix, "stmatrix": _store_matrix,
    "mma": _multiply_fragments, "wgmma": _multiply_shared, "elect": _elect, "redux": _reduce_warp, "shfl": _shuffle, "cvt": _convert,
    "setp": _compare, "selp": _select, "shl": _shift, "shr": _shift, "bfe": _extract_bits, "mad": _multiply_wide_add,
}  # fmt: skip
