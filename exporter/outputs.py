"""Where results go: looked at before the work that they come of, which would be lost."""

from __future__ import annotations

import os
from pathlib import Path

from .schedule import ScheduleError

__all__ = ["check_file", "check_folder"]


def check_file(path: Path, what: str) -> None:
    """Refuse a file that could not be written.

    Raises:
        ScheduleError: it is a folder, its folder is missing, or this user may not write it.
    """
    if path.is_dir():
        raise ScheduleError(f"{path} is a folder; name a file for the {what}")
    if not path.parent.is_dir():
        raise ScheduleError(f"{path.parent}: no such folder for the {what}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ScheduleError(f"{path}: may not be written; choose another place for the {what}")


def check_folder(path: Path) -> None:
    """Refuse a folder that holds other things, or that could not be made.

    Raises:
        ScheduleError: it is not empty, no folder, or this user may not write it.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ScheduleError(f"{path} is not an empty folder; choose another --output")
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ScheduleError(f"{path}: no folder can be made in {nearest}; choose another --output")
