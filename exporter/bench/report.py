"""What was measured, as data and as tables: times, and speed-ups over the first engine beside the limits that arithmetic sets.

Text in the tables is no markup (``console.print_tables``).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ...engines.manifest import Engine
from ..report import bytes_text
from .limits import Limits, limits
from .measurement import Timing, median, spread
from .runner import Measured
from .subjects import schedule_of

__all__ = ["bench_tables", "bench_values", "processor"]

TIMES: dict[str, Callable[[Timing], float | None]] = {
    "vision": lambda timing: timing.vision_s,
    "prefill": lambda timing: timing.prefill_s,
    "sampling": lambda timing: timing.sampling_s,
    "first token": lambda timing: timing.first_token_s,
}
PROCESSOR_FILE = "/proc/cpuinfo"
# Part → its seconds, its limit by operations, its limit by bytes.
PARTS: dict[str, tuple[Callable[[Timing], float | None], Callable[[Limits], float | None], Callable[[Limits], float | None]]] = {
    "vision": (lambda timing: timing.vision_s, lambda limit: limit.vision_flops, lambda limit: limit.vision_bytes),
    "prefill": (lambda timing: timing.prefill_s, lambda limit: limit.prefill_flops, lambda limit: limit.prefill_bytes),
    "first token": (lambda timing: timing.answer_s, lambda limit: limit.first_token_flops, lambda limit: None),
    "a token": (lambda timing: timing.step_s, lambda limit: None, lambda limit: limit.step_bytes),
}


def bench_values(measured: Sequence[Measured], engines: dict[str, Engine], *, threads: int) -> dict[str, Any]:
    """Everything, for ``--json``: the machine, and by subject and side the answers, medians, speed-ups and limits. ``engines`` by path."""
    results = []
    for subject in measured:
        sides = []
        for side, timings in subject.timings.items():
            limit = _limits(subject, measured[0], engines, side)
            speed_ups = {
                part: _ratio(*(median(who, seconds) for who in (measured[0].timings[side], timings))) for part, (seconds, _, _) in PARTS.items()
            }
            sides.append({
                "side": side,
                "median_s": {name: median(timings, quantity) for name, quantity in TIMES.items()} | {"a token": median(timings, PARTS["a token"][0])},
                "speed_up": speed_ups,
                "limits": asdict(limit) if limit is not None else None,
                "answers": [timing.to_dict() for timing in timings],
            })  # fmt: skip
        spec = {key: value for key, value in subject.spec.to_dict().items() if key != "workspace"}
        results.append({**spec, "versions": subject.versions, "sides": sides})
    return {"machine": machine(threads), "yardstick": measured[0].spec.name, "results": results}


def machine(threads: int) -> dict[str, Any]:
    """What was measured on."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path(PROCESSOR_FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def bench_tables(measured: Sequence[Measured], engines: dict[str, Engine]) -> Iterator[Table]:
    """Three tables a side: times, what memory holds, and speed-ups over the first subject."""
    for side, timings in measured[0].timings.items():
        example, image = timings[0], f"{side}×{side}"
        tokens = f"{example.visual_tokens[0]} visual and {example.text_tokens} text tokens, {example.new_tokens} new"
        times = _table(f"{image}: {tokens}; milliseconds, median of {len(timings)}", [*TIMES, "least–most", "tokens/s"])
        memory = _table(f"{image}: memory", ["visual tokens", "KV in use", "peak of the process"])
        for subject in measured:
            times.add_row(_short(subject), *_times_row(subject.timings[side]))
            memory.add_row(_short(subject), *_memory_row(subject.timings[side]))
        yield times
        yield memory
        if len(measured) > 1:
            title = f"{image}: times faster than {_short(measured[0])} (limit by operations · by bytes moved)"
            speed_ups = _table(title, [*PARTS, "of limit"])
            for subject in measured[1:]:
                speed_ups.add_row(_short(subject), *_speed_up_row(subject, measured[0], engines, side))
            yield speed_ups


def _times_row(timings: Sequence[Timing]) -> Iterator[str]:
    for quantity in TIMES.values():
        yield _milliseconds(median(timings, quantity))
    least, most = spread(timings, lambda timing: timing.first_token_s)
    yield f"{_milliseconds(least)}–{_milliseconds(most)}"
    step = median(timings, lambda timing: timing.step_s)
    yield f"{1 / step:.1f}" if step else "–"


def _memory_row(timings: Sequence[Timing]) -> Iterator[str]:
    yield " → ".join(map(str, timings[0].visual_tokens))
    kv, peaks = timings[0].kv_bytes, [timing.peak_memory_bytes for timing in timings if timing.peak_memory_bytes is not None]
    yield bytes_text(kv) if kv is not None else "–"
    yield bytes_text(max(peaks)) if peaks else "–"


def _speed_up_row(subject: Measured, yardstick: Measured, engines: dict[str, Engine], side: int) -> Iterator[str]:
    limit = _limits(subject, yardstick, engines, side)
    for seconds, by_operations, by_bytes in PARTS.values():
        ratio = _ratio(median(yardstick.timings[side], seconds), median(subject.timings[side], seconds))
        if ratio is None:
            yield "–"
            continue
        bounds = [f"{bound:.2f}" for bound in (by_operations(limit), by_bytes(limit)) if bound is not None] if limit else []
        yield f"{ratio:.2f}" + (f" ({' · '.join(bounds)})" if bounds else "")
    ratio = _ratio(*(median(who.timings[side], lambda timing: timing.answer_s) for who in (yardstick, subject)))
    yield f"{ratio / limit.first_token_flops:.2f}" if limit and ratio and subject.spec.kind == "engine" else ""


def _limits(subject: Measured, yardstick: Measured, engines: dict[str, Engine], side: int) -> Limits | None:
    engine, first = engines[subject.spec.engine], engines[yardstick.spec.engine]
    ours, theirs = schedule_of(subject.spec, engine), schedule_of(yardstick.spec, first)
    if ours is None or theirs is None:
        return None
    text = yardstick.timings[side][0].text_tokens
    return limits(ours, theirs, engine.shape, side=side // engine.image_processor.factor, text_tokens=text, bytes_per_value=engine.itemsize)


def _short(subject: Measured) -> str:
    return Path(subject.spec.name).name if subject.spec.kind == "engine" else subject.spec.name


def _ratio(yardstick: float | None, seconds: float | None) -> float | None:
    return yardstick / seconds if yardstick and seconds else None


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.1f}"


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=heading not in PARTS)
    return table
