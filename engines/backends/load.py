"""Which backend computes an engine: ONNX Runtime takes every engine directory, the others what was built for them."""

from __future__ import annotations

from ..errors import EngineError
from ..graphs import RUNTIMES
from ..manifest import Engine
from .base import Backend
from .onnxruntime import OnnxRuntimeBackend

__all__ = ["load_backend"]


def load_backend(engine: Engine, target: str, *, provider: str | None = None, threads: int | None = None) -> Backend:
    """The engine, loaded for one of ``RUNTIMES``; ``provider`` and ``threads`` as :class:`OnnxRuntimeBackend`, and for it alone.

    Raises:
        EngineError: an unknown target, one that the directory was not built for, or a machine that cannot run it.
    """
    if target not in RUNTIMES:
        raise EngineError(f"target must be one of {', '.join(RUNTIMES)}, got {target!r}")
    if target == "onnxruntime":
        return OnnxRuntimeBackend(engine, provider=provider, threads=threads)
    if provider is not None or threads is not None:
        raise EngineError(f"provider and threads are settings of ONNX Runtime; leave them out with target {target}")
    from .tensorrt import TensorRTBackend

    return TensorRTBackend(engine, target=target)
