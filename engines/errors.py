"""The error that every module of this room raises for something that its user can put right, and those that a server tells apart."""

from __future__ import annotations

__all__ = ["EngineError", "QueueFull", "RequestCancelled", "RequestTimeout", "ShuttingDown"]


class EngineError(ValueError):
    """An engine, a request or a machine that cannot be used; the message is one line and says what to do."""


class QueueFull(EngineError):  # noqa: N818  # a state of the batcher, not a fault
    """As many requests are waiting as may."""


class RequestTimeout(EngineError):  # noqa: N818  # the user's limit, not a fault
    """A request whose time ran out, in the queue or while it was answered."""


class RequestCancelled(EngineError):  # noqa: N818  # the user's wish, not a fault
    """A request that nobody wants answered any more."""


class ShuttingDown(EngineError):  # noqa: N818  # a state of the batcher, not a fault
    """The batcher takes no more requests, or was closed before this one was answered."""
