"""Weights of the decoder's projections in fewer bits: codes and scales, rounded to the nearest, no calibration.

Only the weights are stored so; activations, attention and caches keep the engine's precision. Embeddings, head, norms and the vision tower stay as
they are: they are few, or shared, or what small errors hurt most. In the graph a weight is a ``DequantizeLinear`` of its codes, which ONNX Runtime
and TensorRT for RTX both take.

    int8  one scale an output channel: 8 bits and a little
    int4  one scale a block of 32 inputs of an output channel: 4.5 bits in fp16
    fp8   one scale an output channel; float8 e4m3, for GPUs of compute capability 8.9 and later
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["BLOCK", "dequantize", "is_quantized", "quantize", "quantize_model", "scale_shape"]

BLOCK = 32  # inputs that share a scale in int4
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}  # codes are symmetric; 448 is the largest number of float8 e4m3
DECODER = "language_model.layers."


def is_quantized(name: str, inputs: int, weights: str) -> bool:
    """Whether a matrix of the checkpoint is stored in fewer bits; int4 takes those whose inputs make whole blocks."""
    return weights != "full" and name.startswith(DECODER) and (weights != "int4" or inputs % BLOCK == 0)


def scale_shape(inputs: int, outputs: int, weights: str) -> tuple[int, ...]:
    """Shape of the scales of a weight [inputs, outputs]."""
    return (inputs // BLOCK, outputs) if weights == "int4" else (outputs,)


def quantize(weight: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight.

    Args:
        weight: T [inputs, outputs], in the dtype that the graph computes with.

    Returns:
        Codes [inputs, outputs], int8 (for int4 as well, −7 … 7) or float8_e4m3fn; scales T of :func:`scale_shape`.
    """
    blocks = _blocks(weight.float(), weights)  # [blocks, inputs of a block, outputs]
    largest = blocks.abs().amax(1)
    scales = (largest / LARGEST[weights]).to(weight.dtype)
    below = scales.float() * LARGEST[weights] < largest * (1 - torch.finfo(weight.dtype).eps)  # subnormal ones, rounded down by up to all there is
    scales = torch.where(below, _next_larger(scales), scales)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (blocks / scales.float()[:, None]).clamp(-LARGEST[weights], LARGEST[weights]).reshape(weight.shape)
    codes = codes.to(torch.float8_e4m3fn) if weights == "fp8" else codes.round().to(torch.int8)
    return codes, scales.reshape(scale_shape(weight.shape[0], weight.shape[1], weights))


def dequantize(codes: Tensor, scales: Tensor, weights: str) -> Tensor:
    """What DequantizeLinear makes of them: [inputs, outputs] in the scales' dtype."""
    blocks = _blocks(codes.to(scales.dtype), weights)
    return (blocks * scales.reshape(len(blocks), 1, -1)).reshape(codes.shape)


@torch.no_grad()
def quantize_model(model: Any, weights: str) -> None:
    """Give a Hugging Face model the weights that an engine computes with."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and is_quantized(name.removeprefix("model."), parameter.shape[1], weights):
            parameter.copy_(dequantize(*quantize(parameter.T, weights), weights).T)


def _next_larger(positive: Tensor) -> Tensor:
    bits = torch.int32 if positive.dtype == torch.float32 else torch.int16
    return (positive.view(bits) + 1).view(positive.dtype)


def _blocks(weight: Tensor, weights: str) -> Tensor:
    return weight.reshape(-1, BLOCK if weights == "int4" else weight.shape[0], weight.shape[1])
