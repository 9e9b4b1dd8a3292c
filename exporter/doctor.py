"""What this machine can build and run, and what to install for the rest."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util

from ..engines.backends.onnxruntime import MINIMUM_VERSION, check_version
from ..engines.errors import EngineError

__all__ = ["Condition", "examine"]


@dataclass(frozen=True)
class Condition:
    """One thing looked at; ``required`` where engines cannot run without it."""

    what: str
    ok: bool
    detail: str
    required: bool = False


def examine() -> list[Condition]:
    """Look at packages and devices; imports nothing heavy but ONNX Runtime."""
    return list(_conditions())


def _conditions() -> Iterator[Condition]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0.0
    machine = f"Python {platform.python_version()}, {os.cpu_count()} CPUs, {memory:.0f} GiB memory"
    yield Condition("machine", True, machine)
    yield from _onnxruntime()
    yield _package("build", ("torch", "transformers", "onnx", "onnxscript", "tritonclient"), "pip install 'vflow-export[build]'")
    yield _package("TensorRT for RTX", ("tensorrt_rtx",), "pip install 'vflow-export[tensorrt-rtx]'")
    yield _package("TensorRT", ("tensorrt",), "pip install 'vflow-export[tensorrt]' (needs an NVIDIA GPU to build)")
    yield _package("TensorRT-LLM", ("tensorrt_llm",), "pip install 'vflow-export[tensorrt-llm]' (needs an NVIDIA GPU)")
    yield _package("kernels (Triton language)", ("triton",), "pip install 'vflow-export[kernels]'")
    yield _package("Triton server", ("pytriton",), "pip install 'vflow-export[triton-server]' on its own, or Triton's container")


def _onnxruntime() -> Iterator[Condition]:
    try:
        import onnxruntime
    except ImportError:
        least = ".".join(map(str, MINIMUM_VERSION))
        yield Condition("ONNX Runtime", False, f"pip install 'onnxruntime>={least}'", required=True)
        return
    try:
        check_version(onnxruntime.__version__)
    except EngineError as error:
        yield Condition("ONNX Runtime", False, str(error), required=True)
        return
    yield Condition("ONNX Runtime", True, f"{onnxruntime.__version__}, runs engines on the CPU", required=True)
    cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    yield Condition("ONNX Runtime CUDA", cuda, "runs engines on the GPU" if cuda else "pip install 'vflow-export[gpu]' instead of onnxruntime")


def _package(what: str, modules: tuple[str, ...], install: str) -> Condition:
    missing = [name for name in modules if util.find_spec(name) is None]
    if missing:
        return Condition(what, False, install)
    return Condition(what, True, ", ".join(f"{name} {_version(name)}" for name in modules))


def _version(module: str) -> str:
    distributions = metadata.packages_distributions().get(module, [module])
    try:
        return metadata.version(distributions[0])
    except metadata.PackageNotFoundError:
        return "(version unknown)"
