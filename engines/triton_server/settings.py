"""The parameters of config.pbtxt: which engine, and how much it may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EngineError
from .interface import PARAMETERS

__all__ = ["DEFAULT_DRAIN", "DEFAULT_QUEUE_LIMIT", "Settings"]

DEFAULT_QUEUE_LIMIT = 32  # more than a batcher alone: autoscaling acts on the queue's depth, so there must be one
DEFAULT_DRAIN = 20.0  # seconds; Triton itself waits for answers before it unloads a model (--exit-timeout-secs, 30), so few are left by then


@dataclass(frozen=True)
class Settings:
    """What a model is started with.

    Attributes:
        engine: the engine directory; a relative path starts at the model's folder.
        slots, kv_memory: one of the two, or none; kv_memory in bytes. As queue_limit, provider and threads of :class:`vflow.engines.Batcher`.
        drain: seconds that answers are given to end when the model is unloaded.
    """

    engine: str
    slots: int | None = None
    kv_memory: int | None = None
    queue_limit: int = DEFAULT_QUEUE_LIMIT
    provider: str | None = None
    threads: int | None = None
    drain: float = DEFAULT_DRAIN

    def to_parameters(self) -> dict[str, str]:
        """As config.pbtxt holds them; what is left to the default is left out."""
        values = {name: getattr(self, name) for name in PARAMETERS}
        return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Settings:
        """Read a model's configuration, as Triton passes it to the model.

        Raises:
            EngineError: a parameter that is missing, unknown, or no number where it must be one.
        """
        given = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        for name in given:
            if name not in PARAMETERS:
                raise EngineError(f"config.pbtxt: parameter {name} is not known (known: {', '.join(PARAMETERS)})")
        if not given.get("engine"):
            raise EngineError(
                "config.pbtxt: parameter engine is missing; it is the path of the engine directory, from the model's folder or absolute"
            )
        values: dict[str, Any] = {name: _number(name, given[name], int) for name in ("slots", "kv_memory", "queue_limit", "threads") if name in given}
        if "drain" in given:
            values["drain"] = _number("drain", given["drain"], float)
        return cls(given["engine"], provider=given.get("provider"), **values)

    def engine_path(self, model_folder: str | Path) -> Path:
        """Where the engine is, seen from the model's folder."""
        return (Path(model_folder) / self.engine).resolve()


def _number(name: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise EngineError(f"config.pbtxt: parameter {name} must be a {'whole ' if kind is int else ''}number from 0, got {text!r:.60}")
    return value
