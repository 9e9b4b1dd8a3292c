"""Fields of a JSON object, taken one by one and checked; whoever reads a manifest says the same about what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import EngineError

__all__ = ["choice", "count", "field", "number", "positive"]

KINDS: dict[type, str] = {int: "a whole number", str: "a string", list: "a list", Mapping: "an object"}


def field(values: Mapping[str, Any], key: str, kind: type, where: str = "") -> Any:
    """``values[key]``, of this type; ``where`` is the path to it, for the message.

    Raises:
        EngineError: missing or of another type.
    """
    if key not in values:
        raise EngineError(f"field {where}{key} is missing")
    value = values[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise EngineError(f"field {where}{key} must be {KINDS[kind]}, got {value!r:.60}")
    return value


def positive(values: Mapping[str, Any], key: str, where: str) -> int:
    """A whole number from 1 on."""
    value: int = field(values, key, int, where)
    if value < 1:
        raise EngineError(f"field {where}{key} must be at least 1, got {value}")
    return value


def count(values: Mapping[str, Any], key: str, where: str) -> int:
    """A whole number from 0 on."""
    value: int = field(values, key, int, where)
    if value < 0:
        raise EngineError(f"field {where}{key} must be at least 0, got {value}")
    return value


def number(values: Mapping[str, Any], key: str, where: str) -> float:
    """A number from 0 on, whole or not."""
    value = values.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0:
        raise EngineError(f"field {where}{key} must be a number from 0 on, got {value!r:.60}")
    return float(value)


def choice(values: Mapping[str, Any], key: str, known: tuple[str, ...]) -> Any:
    """One of the strings ``known``."""
    value = field(values, key, str)
    if value not in known:
        raise EngineError(f"{key} {value!r} is not known (known: {', '.join(known)})")
    return value
