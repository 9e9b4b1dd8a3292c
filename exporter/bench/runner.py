"""Rounds over all subjects in turn, one answering at a time, each in a process of its own while memory allows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from ...engines.errors import EngineError
from ..child_process import last_words
from .measurement import Request, Timing
from .subjects import SubjectSpec

__all__ = ["Measured", "measure_in_turns"]

MEMORY_STATUS = "/proc/meminfo"
ROOM = 1.6  # of the weights' bytes: a packed copy beside the mapped file, and activations
END_SECONDS = 10

Progress = Callable[[str, float], None]


@dataclass
class Measured:
    """A subject's answers by side, in the order of the rounds."""

    spec: SubjectSpec
    versions: dict[str, str] = field(default_factory=dict)
    timings: dict[int, list[Timing]] = field(default_factory=dict)


def measure_in_turns(
    specs: Sequence[SubjectSpec],
    sides: Sequence[int],
    *,
    new_tokens: int,
    repeats: int,
    warm_up: int = 1,
    one_at_a_time: bool | None = None,
    progress: Progress = lambda phase, share: None,
) -> list[Measured]:
    """Time every subject at every side, ``repeats`` times after ``warm_up`` rounds that do not count; every other round runs backwards.

    Args:
        one_at_a_time: hold one subject in memory, and load it anew each round; None does so where the memory that is free asks for it.

    Raises:
        EngineError: a subject that cannot be loaded or fails, by name.
    """
    results = {spec.name: Measured(spec, timings={side: [] for side in sides}) for spec in specs}
    rounds = warm_up + repeats
    with _Children(one_at_a_time) as children:
        for number in range(rounds):
            for place, spec in enumerate(specs if number % 2 == 0 else list(reversed(specs))):
                for turn, side in enumerate(sides):
                    share = (number + (place + turn / len(sides)) / len(specs)) / rounds
                    progress(f"{'warm-up' if number < warm_up else f'round {number - warm_up + 1}'}: {spec.name}, {side}×{side}", share)
                    results[spec.name].versions, answer = children.ask(spec, Request(side, new_tokens))
                    if number >= warm_up:
                        results[spec.name].timings[side].append(Timing.from_dict(answer))
    return list(results.values())


class _Children:
    """The processes that are loaded, the one used last at the end."""

    def __init__(self, one_at_a_time: bool | None) -> None:
        self._one_at_a_time = one_at_a_time
        self._loaded: dict[str, _Child] = {}

    def __enter__(self) -> _Children:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for child in self._loaded.values():
            child.end()

    def ask(self, spec: SubjectSpec, request: Request) -> tuple[dict[str, str], dict[str, Any]]:
        """The subject's versions and its answer; it is loaded first where it is not."""
        child = self._loaded.pop(spec.name, None)
        if child is None:
            self._make_room(spec)
            child = _Child(spec)
        self._loaded[spec.name] = child
        if not child.versions:
            child.versions = child.ask(spec.to_dict())["versions"]
        return child.versions, child.ask(asdict(request))

    def _make_room(self, spec: SubjectSpec) -> None:
        while self._loaded and self._crowded(spec):
            self._loaded.pop(next(iter(self._loaded))).end()

    def _crowded(self, spec: SubjectSpec) -> bool:
        if self._one_at_a_time is not None:
            return self._one_at_a_time
        free = _free_memory()
        return free is not None and free < ROOM * spec.weights_bytes


class _Child:
    """One process, which ends with this one, whatever ends it: its input is closed then."""

    def __init__(self, spec: SubjectSpec) -> None:
        self.name, self.versions = spec.name, dict[str, str]()
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  # closed when the process is ended
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(spec.threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints,
            env=environment, text=True, encoding="utf-8",
        )  # fmt: skip

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(f"{self.name} ended while it was measured ({last_words(self._complaints, self._process.wait())})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error']}")
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=END_SECONDS)
        self._complaints.close()


def _free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        with open(MEMORY_STATUS, encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")), None)
    except OSError:
        return None
