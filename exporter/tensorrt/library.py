"""TensorRT and TensorRT for RTX through Polygraphy: which of the two a process uses, and a log of all that it says.

Polygraphy decides when it is imported, so one process builds for one of the two.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...engines.errors import EngineError

__all__ = ["MODULES", "Library", "load_library"]

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}  # target → what is imported
SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"


@dataclass(frozen=True)
class Library:
    """One of the two, imported.

    Attributes:
        trt: the module ``tensorrt_rtx`` or ``tensorrt``; both have one interface.
        loaders: ``polygraphy.backend.trt``; create_config: its builder configuration for this library; failure: what it raises.
        log: (severity, message) of everything that the library said, most severe = 0. It keeps one logger for a whole process, the first that it was
            given, so there is one list: clear it before what you want to hear about.
    """

    target: str
    trt: Any
    loaders: Any
    create_config: Callable[..., Any]
    failure: type[Exception]
    log: list[tuple[int, str]]

    def said(self, at_most: str) -> list[str]:
        """Messages of this severity (``ERROR``, ``WARNING``, ``INFO``) and worse."""
        limit = int(getattr(self.trt.ILogger, at_most))
        return [message for severity, message in self.log if severity <= limit]


_loaded: list[Library] = []


def load_library(target: str) -> Library:
    """Import the library of a target, with Polygraphy.

    Raises:
        EngineError: this process has loaded the other one.
        ImportError: a package is missing.
    """
    if _loaded:
        if _loaded[0].target != target:
            raise EngineError(f"this process builds for {_loaded[0].target}; build for {target} in another one")
        return _loaded[0]
    use_rtx = target == "tensorrt-rtx"
    if "polygraphy.backend.trt" in sys.modules and use_rtx != importlib.import_module("polygraphy.config").USE_TENSORRT_RTX:
        raise EngineError(f"Polygraphy was imported for the other library; set {SWITCH}={int(use_rtx)}")
    os.environ[SWITCH] = str(int(use_rtx))
    trt = importlib.import_module(MODULES[target])
    settings: Any = importlib.import_module("polygraphy.config")
    settings.USE_TENSORRT_RTX = use_rtx  # it may have been imported before the variable was set
    loaders: Any = importlib.import_module("polygraphy.backend.trt")
    configs: Any = importlib.import_module("polygraphy.backend.tensorrt_rtx") if use_rtx else loaders
    messages: Any = importlib.import_module("polygraphy.logger")
    messages.G_LOGGER.module_severity = messages.G_LOGGER.CRITICAL
    log: list[tuple[int, str]] = []
    # Polygraphy's own logger drops a warning that it has seen before: the second graph's would be missed.
    trt_util: Any = importlib.import_module("polygraphy.backend.trt.util")
    trt_util.TRT_LOGGER = _logger(trt, log)
    failure: Any = importlib.import_module("polygraphy.exception").PolygraphyException
    library = Library(target, trt, loaders, configs.CreateConfigRTX if use_rtx else configs.CreateConfig, failure, log)
    _loaded.append(library)
    return library


def _logger(trt: Any, log: list[tuple[int, str]]) -> Any:
    class Recorder(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            log.append((int(severity), message))

    return Recorder()
