"""The error that every module of this room raises for something that its user can put right."""

from __future__ import annotations

__all__ = ["EngineError"]


class EngineError(ValueError):
    """An engine, a request or a machine that cannot be used; the message is one line and says what to do."""
