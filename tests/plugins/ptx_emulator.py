"""Runs compiled kernels without a GPU: the PTX that an engine directory holds, all threads of a block at once as arrays.

Stricter than a GPU, to find mistakes. Refused are accesses outside of an argument, or at an address that is no multiple of their width; accesses to
one byte by two threads, of which one writes, without a barrier between them, or by two blocks at all; instructions for whole warps that a part of
one never reaches; and every instruction that is not known. What nothing was written to is garbage. Asynchronous copies take place when they are
waited for, no sooner. Not here: time, the rounding of approximate instructions, and the fences between matrix units and other accesses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ptx_instructions import compile_instruction
from ptx_machine import GARBAGE, SHARED_BASE, WARP, Array, Block, EmulationError, Memory
from ptx_operands import Step
from ptx_tensor_memory import WAIT, compile_tensor_memory, must_wait, one_wait

__all__ = ["EmulationError", "Kernel"]

BARRIERS = ("bar.sync", "barrier.sync")
LEAVING = ("bra", "bra.uni", "ret")
IGNORED = ("fence",)


class Instruction(NamedTuple):
    """``step`` is what it does; without, it is a barrier, a return or a branch to ``target``. ``holds`` says which threads must wait before."""

    text: str
    name: str
    guard: str
    step: Step | None
    target: str = ""
    holds: Callable[[Block], Array] | None = None


class Kernel:
    """The one kernel of a PTX text. ``instructions`` counts those that warps have issued, in all launches.

    Raises:
        EmulationError: an instruction that is not emulated.
    """

    def __init__(self, ptx: str) -> None:
        match = re.search(r"\.entry\s+\w+\s*\((.*?)\)\s*\.reqntid (\d+).*?\{(.*)\}", re.sub(r"//.*", "", ptx), re.DOTALL)
        if match is None:
            raise EmulationError("no kernel with a fixed number of threads")
        self.parameters = re.findall(r"(\w+)\s*(?:,|$)", match.group(1).strip())
        self.threads = int(match.group(2))
        self.instructions = 0
        self._labels: dict[str, int] = {}
        self._program: list[Instruction] = []
        for statement in one_wait(match.group(3)).replace("\n", " ").split(";"):
            self._add(statement.strip())
        self._holding = {place: instruction.holds for place, instruction in enumerate(self._program) if instruction.holds is not None}
        self._of_warp = np.array([".sync" in instruction.name for instruction in self._program])  # executed by whole warps

    def _add(self, statement: str) -> None:
        while label := re.match(r"(\$\w+):\s*", statement):
            self._labels[label.group(1)] = len(self._program)
            statement = statement[label.end() :]
        if not statement or statement.startswith("."):
            return
        match = re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
        if match is None:
            raise EmulationError(f"not emulated: {statement}")
        guard, name, rest = match.group(1) or "", match.group(2), match.group(3)
        if name in LEAVING or name in BARRIERS:
            self._program.append(Instruction(statement, name, guard, None, rest))
        elif name.partition(".")[0] not in IGNORED:
            operands = [operand.strip() for operand in re.split(r",(?![^{]*\})", rest)]
            parts = name.replace("::", ":").split(".")
            try:
                step = (compile_tensor_memory if parts[0] in ("tcgen05", "mbarrier") else compile_instruction)(parts, operands)
                self._program.append(Instruction(statement, name, guard, step, holds=must_wait(operands) if name == WAIT else None))
            except (KeyError, ValueError, IndexError):
                raise EmulationError(f"not emulated: {statement}") from None

    def run(self, grid: Sequence[int], shared_bytes: int, arguments: Sequence[Array | int]) -> list[Memory]:
        """Launch. In place of pointers there are arrays, contiguous ones, into which the kernel writes.

        Returns:
            The memory of each array, which has counted what was read and written.

        Raises:
            EmulationError: see above.
        """
        memories: list[Memory] = []
        values: dict[str, int] = {}
        for name, argument in zip(self.parameters, arguments, strict=True):
            if not isinstance(argument, int):
                memories.append(Memory(name, (len(memories) + 1) << 40, argument.reshape(-1).view(np.uint8)))
            values[name] = argument if isinstance(argument, int) else memories[-1].base
        indices = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        for number, index in enumerate(indices):
            shared = Memory("shared memory", SHARED_BASE, np.full(shared_bytes, GARBAGE, np.uint8))
            with np.errstate(all="ignore"):
                self._run_block(Block(self.threads, number, index, [shared, *memories], values))
        return memories

    def _run_block(self, block: Block) -> None:
        """Of the threads that can go on, those at the earliest instruction do; a warp waits for all its threads where it is needed whole."""
        end = len(self._program)
        waiting = np.zeros(block.threads, bool)  # at a barrier
        while (live := block.places < end).any():
            if waiting[live].all():
                block.barriers += 1
                block.places[waiting] += 1
                waiting[:] = False
                continue
            warps = block.places.reshape(-1, WARP)
            parted = np.repeat((warps != warps[:, :1]).any(1), WARP)
            ready = live & ~waiting & ~(parted & self._of_warp[np.minimum(block.places, end - 1)])
            for place, holds in self._holding.items():
                if (block.places == place).any():
                    ready &= ~((block.places == place) & holds(block))
            if not ready.any():
                place = int(block.places[live & ~waiting].min())
                raise EmulationError(f"a part of a warp never comes (block {block.index}: {self._program[place].text})")
            self._advance(block, ready & (block.places == block.places[ready].min()), waiting)

    def _advance(self, block: Block, active: Array, waiting: Array) -> None:
        """The threads ``active``, which are at one place: all of a block to where they part or wait, a part of it by one instruction."""
        every, end = active.all(), len(self._program)
        warps = int(active.reshape(-1, WARP).any(1).sum())
        place = int(block.places[active][0])
        while place < end:
            text, name, guard, step, target, holds = self._program[place]
            if holds is not None and (holds(block) & active).any():
                break
            self.instructions += warps
            chosen = active & (block.read(guard.lstrip("!")) ^ guard.startswith("!")) if guard else active
            if step is not None:
                if chosen.any():
                    try:
                        step(block, None if chosen.all() else chosen)
                    except EmulationError as error:
                        raise EmulationError(f"{error} (block {block.index}: {text})") from None
                place += 1
            elif name in BARRIERS:
                block.places[active] = place
                waiting |= active
                return
            elif (chosen == active).all():
                place = self._labels.get(target, end)
            else:
                block.places[active] = place + 1
                block.places[chosen] = self._labels.get(target, end)
                return
            if not every:
                break
        block.places[active] = place
