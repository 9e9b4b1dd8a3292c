"""How a ``vflow`` op is called: computed when called, one node when traced.

Each op of the domain is a Python function beside its ONNX function body. Under ``torch.onnx.export`` the function
emits the node; otherwise it calls the PyTorch operator (``torch_ops.py``). Output shapes are given explicitly, so that counts stay
expressions of the shapes that enter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx.parser
import torch
from torch import Tensor

__all__ = ["DOMAIN", "OPSET", "VERSION", "emit", "function_body", "is_tracing", "length_vector"]

DOMAIN = "vflow"
VERSION = 1
OPSET = 24  # of the standard operators inside the bodies

Attributes = Mapping[str, int | float]
Output = tuple[torch.dtype, Sequence[int | torch.SymInt]]


def is_tracing() -> bool:
    """Whether this call is being exported to ONNX."""
    return torch.onnx.is_in_onnx_export()


def emit(op: str, inputs: Sequence[Tensor], attributes: Attributes, outputs: Sequence[Output]) -> Sequence[Tensor]:
    """Put one ``vflow`` node into the graph that is being traced."""
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{op}",
        inputs,
        dict(attributes),
        dtypes=[dtype for dtype, _ in outputs],
        shapes=[shape for _, shape in outputs],
        version=VERSION,
    )


def length_vector(length: int | torch.SymInt, like: Tensor) -> Tensor:
    """A count as the length of a vector int32 [length] whose values do not matter.

    That is the form in which nodes take counts: output shapes may follow from input shapes in every engine, but from values in a
    TensorRT plugin never.
    """
    return torch.zeros(length, dtype=torch.int32, device=like.device)


def function_body(text: str) -> onnx.FunctionProto:
    """Parse an ONNX function written in the textual syntax (onnx/docs/Syntax.md), domain and imports added."""
    head = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>'
    return onnx.parser.parse_function(head + text)
