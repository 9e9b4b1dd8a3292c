"""Runs a kernel on PyTorch tensors, by its contract: shapes bound and checked, outputs allocated, one launch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .contract import ContractError, KernelSpec, bind, evaluate

__all__ = ["DTYPES", "PRECISION_OF", "launch"]

PRECISION_OF = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
DTYPES = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool}


def launch(spec: KernelSpec, inputs: Sequence[Tensor | None], **attributes: float) -> list[Tensor]:
    """Outputs of one kernel launch.

    Args:
        inputs: in the order of ``spec.inputs``, None for an absent optional one; strided tensors are made contiguous first.
        attributes: those that ``spec.attributes`` names.

    Raises:
        ContractError: a shape or dtype does not fit.
    """
    symbols = bind(spec.inputs, [None if tensor is None else tuple(tensor.shape) for tensor in inputs])
    precision_tensors = [t for argument, t in zip(spec.inputs, inputs, strict=True) if argument.dtype == "T" and t is not None]
    dtype = precision_tensors[0].dtype if precision_tensors else torch.float32
    if dtype not in PRECISION_OF:
        raise ContractError(f"{spec.op}: dtype {dtype} is not supported; use float32, float16 or bfloat16")
    for argument, tensor in zip(spec.inputs, inputs, strict=True):
        expected = DTYPES.get(argument.dtype, dtype)
        if tensor is not None and tensor.dtype != expected:
            raise ContractError(f"{spec.op}: {argument.name} must be {expected}, got {tensor.dtype}")
    devices = {tensor.device for tensor in inputs if tensor is not None}
    if len(devices) != 1:
        raise ContractError(f"{spec.op}: inputs are on {', '.join(sorted(map(str, devices)))}; move them to one device")
    device = devices.pop()
    constants = spec.constants({**symbols, **attributes}, PRECISION_OF[dtype])
    outputs = [
        torch.empty([evaluate(size, symbols) for size in argument.shape], dtype=DTYPES.get(argument.dtype, dtype), device=device)
        for argument in spec.outputs
    ]
    grid = [evaluate(size, {**symbols, **{k: v for k, v in constants.items() if type(v) is int}}) for size in spec.grid]
    if 0 in grid:
        return outputs
    arguments: list[Any] = [None if tensor is None else tensor.contiguous() for tensor in inputs]
    sizes = [evaluate(size, symbols) for size in spec.sizes.values()]
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():  # kernels go to the current device
        spec.kernel[tuple(grid)](*arguments, *sizes, *outputs, **constants, num_warps=spec.num_warps, num_stages=spec.num_stages)
    return outputs
