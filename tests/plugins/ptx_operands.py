"""How the instructions of emulated PTX read their operands."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from ptx_machine import SHARED_BASE, Array, Block, EmulationError, register_type

__all__ = ["TYPES", "Source", "Step", "all_threads", "read_address", "read_operand", "vector"]

Step = Callable[[Block, Array | None], None]
Source = Callable[[Block], Array]

TYPES = {
    "pred": "?", "b8": "u1", "b16": "u2", "u16": "u2", "s16": "i2", "b32": "u4", "u32": "u4", "s32": "i4", "b64": "u8", "u64": "u8", "s64": "i8",
    "f32": "f4",
}  # fmt: skip


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


def all_threads(mask: Array | None) -> None:
    if mask is not None:
        raise EmulationError("by a part of a block it is not emulated")
