"""The state that emulated PTX works on: registers of one block's threads, and memory that knows who has touched it and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["ATOMIC", "GARBAGE", "MANY", "SHARED_BASE", "WARP", "Array", "Block", "EmulationError", "Memory", "register_type"]

Array = np.ndarray[Any, Any]
WARP = 32
SHARED_BASE = 1 << 16  # address of a block's shared memory
GARBAGE = 0xFB  # in every byte that nothing was written to: as float32 −2.6e36, as float16 −6e4, as an index far outside
ATOMIC, MANY, NOBODY = -3, -2, -1  # in place of a thread: atomic operations; more than one thread, or block
REGISTER_TYPES = {"%p": np.dtype("?"), "%rs": np.dtype("u2"), "%r": np.dtype("u4"), "%rd": np.dtype("u8")}


class EmulationError(Exception):
    """What a program may not do, or what is not emulated; the message holds the instruction."""


def register_type(name: str) -> np.dtype[Any]:
    """Bits that a register holds, as NumPy type.

    Raises:
        KeyError: not a register.
    """
    return REGISTER_TYPES[name.rstrip("0123456789")]


class Memory:
    """``data`` from address ``base`` on. Two accesses to a byte, one of them a write, need an order: one thread makes both, or a barrier."""

    def __init__(self, name: str, base: int, data: Array) -> None:
        self.name, self.base, self.data = name, base, data
        self.loaded = self.stored = 0  # bytes, in all
        self._writer, self._reader, self._writer_block, self._reader_block = (np.full(len(data), NOBODY, np.int32) for _ in range(4))
        self._written, self._read = (np.full(len(data), -1, np.int64) for _ in range(2))  # barriers passed in all blocks until then

    def load(self, places: Array, threads: Array, block: Block, *, waited_for: bool = False) -> Array:
        """The bytes at ``places`` [accesses, bytes], read by ``threads`` [accesses]: uint8 of that shape.

        ``waited_for``: whoever may write there afterwards has waited for this read.
        """
        self.loaded += places.size
        thread = np.broadcast_to(threads[:, None], places.shape)
        self._refuse(self._written_elsewhere(places, thread, block), places, "is read while another thread writes it")
        if not waited_for:
            again = (self._read[places] == block.time) & (self._reader[places] != thread)
            self._reader[places] = np.where(again, MANY, thread)
            self._read[places] = block.time
            self._reader_block[places] = np.where(_other_block(self._reader_block[places], block), MANY, block.number)
        values: Array = self.data[places]
        return values

    def store(self, places: Array, values: Array, threads: Array, block: Block) -> None:
        """Write ``values``, uint8 [accesses, bytes]. Writing what is there already disturbs nobody."""
        self.stored += places.size
        changed = self.data[places] != values
        thread = np.broadcast_to(threads[:, None], places.shape)[changed]
        self.check_store(places[changed], thread, block)
        self.data[places] = values
        self._refuse(self.data[places] != values, places, "is written by two threads")
        self.mark_written(places[changed], thread, block)

    def check_store(self, places: Array, thread: Array | int, block: Block) -> None:
        self._refuse(self._written_elsewhere(places, thread, block), places, "is written by two threads")
        here = (self._read[places] == block.time) & (self._reader[places] != thread)
        self._refuse(here | _other_block(self._reader_block[places], block), places, "is written while another thread reads it")

    def mark_written(self, places: Array, thread: Array | int, block: Block) -> None:
        self._writer[places], self._written[places], self._writer_block[places] = thread, block.time, block.number

    def _written_elsewhere(self, places: Array, thread: Array | int, block: Block) -> Array:
        here = (self._written[places] == block.time) & (self._writer[places] != thread)
        elsewhere: Array = here | _other_block(self._writer_block[places], block)
        return elsewhere

    def _refuse(self, wrong: Array, places: Array, reason: str) -> None:
        if wrong.any():
            raise EmulationError(f"byte {int(places[wrong].flat[0])} of {self.name} {reason}")


def _other_block(numbers: Array, block: Block) -> Array:
    other: Array = (numbers != NOBODY) & (numbers != block.number)
    return other


class Block:
    """One block's threads. ``number`` counts the blocks of a launch, ``index`` is the block's own."""

    def __init__(self, threads: int, number: int, index: tuple[int, int, int], memories: list[Memory], parameters: dict[str, int]) -> None:
        self.threads, self.number, self.index, self.memories, self.parameters = threads, number, index, memories, parameters
        self.thread = np.arange(threads, dtype=np.uint32)
        self.places = np.zeros(threads, np.int64)  # of each thread in the program
        self.barriers = 0
        self.copies: list[Callable[[], None]] = []  # asynchronous ones: asked for, and then in groups
        self.groups: list[list[Callable[[], None]]] = []
        self.phases: dict[int, int] = {}  # completed, of barriers in memory, by address
        self.tensor_memory = np.zeros((0, 0), np.uint32)  # [lanes, columns]
        self.products: list[Callable[[], None]] = []  # asked for, and then committed to a barrier
        self.committed: dict[int, list[Callable[[], None]]] = {}
        self._registers: dict[str, Array] = {}

    @property
    def time(self) -> int:
        return self.number << 32 | self.barriers

    def read(self, register: str) -> Array:
        """What a register holds in each thread; garbage before it is written, which compilers do read where it makes no difference."""
        if register not in self._registers:
            kind = register_type(register)
            self._registers[register] = np.full(self.threads * kind.itemsize, GARBAGE, np.uint8).view(kind)
        return self._registers[register]

    def write(self, register: str, values: Array, mask: Array | None) -> None:
        """Bits of ``values``, one a thread and as wide as the register, where ``mask`` says so."""
        if register == "_":
            return
        values = np.ascontiguousarray(values).view(register_type(register))
        self._registers[register] = values if mask is None else np.where(mask, values, self.read(register))

    def write_lanes(self, register: str, values: Array, mask: Array | None) -> None:
        """The same with ``values`` for the threads of ``mask`` alone, narrow ones widened by zeros."""
        result = np.zeros(self.threads, register_type(register))
        result[self.lanes(mask)] = values
        self.write(register, result, mask)

    def lanes(self, mask: Array | None) -> Array:
        """The threads of a mask."""
        return np.arange(self.threads) if mask is None else np.flatnonzero(mask)

    def memory(self, addresses: Array, width: int) -> tuple[Memory, Array]:
        """The memory in which accesses of ``width`` bytes lie, and the places of these bytes in it: int64 [accesses, width]."""
        first = int(addresses[0])
        memory = next((m for m in self.memories if m.base <= first < m.base + len(m.data)), None)
        if memory is None:
            raise EmulationError(f"address {first:#x} lies in no argument")
        start = addresses.astype(np.int64) - memory.base
        if start.min() < 0 or start.max() + width > len(memory.data):
            raise EmulationError(f"bytes {start.min()} to {start.max() + width} of {memory.name}, which has {len(memory.data)}")
        if (start % width).any():
            raise EmulationError(f"an address in {memory.name} that is no multiple of {width}")
        return memory, start[:, None] + np.arange(width)
