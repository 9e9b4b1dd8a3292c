"""PyTorch operators of the domain: ``torch.ops.vflow.<name>``, one name for every device.

The reference is the CPU implementation, a shape function serves tracing and compilation, and on CUDA the kernel in the Triton language
runs. Kernels are imported on their first call, since the Triton language is an optional dependency.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contract import KernelSpec

__all__ = ["register"]

# PyTorch has not typed this class, hence what is ignored here and below.
_library = torch.library.Library("vflow", "DEF")  # type: ignore[no-untyped-call]


def register(schema: str, reference: Callable[..., Any], shapes: Callable[..., Any], kernel: str) -> Callable[..., Any]:
    """Define one operator.

    Args:
        schema: in PyTorch's notation, ``name(Tensor x, …) -> Tensor``; tensors come in the kernel's order, numbers after them.
        reference: computes it on any device with PyTorch; shapes: empty outputs of the right shapes and dtypes.
        kernel: module and name of its ``KernelSpec``, as ``importance_kernels:ROW_LOG_SUM_EXP``.

    Returns:
        The operator.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)  # type: ignore[no-untyped-call]

    def on_cuda(*arguments: Any, **numbers: Any) -> Any:
        outputs = _launch(kernel, arguments, numbers)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    _library.impl(name, reference, "CPU")  # type: ignore[no-untyped-call]
    _library.impl(name, on_cuda, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"vflow::{name}", shapes, lib=_library)
    operator: Callable[..., Any] = getattr(torch.ops.vflow, name)
    return operator


def _launch(kernel: str, arguments: tuple[Any, ...], numbers: dict[str, Any]) -> list[Tensor]:
    from .launch import launch

    module, _, attribute = kernel.partition(":")
    try:
        spec: KernelSpec = getattr(importlib.import_module(f".{module}", __package__), attribute)
    except ModuleNotFoundError as error:
        raise RuntimeError(f"vflow kernels need the Triton language: pip install 'vflow-export[kernels]' ({error})") from None
    tensors = len(spec.inputs)
    attributes = dict(zip(spec.attributes, arguments[tensors:], strict=False)) | numbers
    return launch(spec, arguments[:tensors], **attributes)
