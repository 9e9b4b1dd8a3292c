"""What all commands share on the terminal: errors as one line, a progress bar, tables, and being stopped."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..engines.errors import EngineError
from .schedule import ScheduleError

__all__ = ["err", "one_line_errors", "print_tables", "progress_bar", "stop_on_signals"]

PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}  # names that users gave hold brackets and colons
UNLIMITED = 1000  # columns
err = Console(stderr=True, **PLAIN)
_stopped = Event()  # Python drops an exception that a signal raises inside a destructor or callback; long jobs look here


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what users can mend into one line on stderr and exit code 1."""
    from ..plugins.compile import CompileError
    from .checkpoint import CheckpointError
    from .data import DataError

    try:
        yield
    except (CheckpointError, CompileError, DataError, EngineError, ScheduleError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; nothing was left behind") from None
    except MemoryError:
        raise click.ClickException("out of memory; choose a smaller model or --precision fp16") from None
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'system'}: {error.strerror or error}") from None


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """A bar that shows phase and share done, on stderr; nothing where stderr is not a terminal but the phases."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("start", total=1.0)
        last = ""

        def report(phase: str, share: float) -> None:
            nonlocal last
            if _stopped.is_set():
                raise KeyboardInterrupt
            if phase != last and not err.is_terminal:
                err.print(f"{phase} ...", soft_wrap=True)
            last = phase
            bar.update(task, description=phase, completed=share)

        yield report


def print_tables(*tables: Table) -> None:
    """Print tables on stdout, what is in them as it is, and each in its own width where neither a terminal nor COLUMNS limits it: of a pipe rich
    takes 80 columns, and folds numbers to fit."""
    limited = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if limited else UNLIMITED, **PLAIN)
    for table in tables:
        console.print(table)


def stop_on_signals() -> None:
    """Let SIGTERM, Ctrl-C and a terminal that goes away stop a command so that it cleans up; what is ignored stays so, as SIGHUP under nohup."""
    _stopped.clear()
    signal.signal(signal.SIGTERM, _interrupt)
    for name in ("SIGINT", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(*_: object) -> None:
    _stopped.set()
    raise KeyboardInterrupt
