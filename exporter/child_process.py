"""What there is to say of a process of ours that has died."""

from __future__ import annotations

from typing import IO

__all__ = ["last_words"]

KILLED = -9  # by the system: SIGKILL, which Linux sends where memory runs out


def last_words(complaints: IO[bytes], code: int) -> str:
    """The last line that it wrote to stderr, a file that ``complaints`` has open, or else its exit code."""
    complaints.seek(0)
    lines = complaints.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {code}" + (", as when memory runs out" if code == KILLED else "")
