"""What a kernel takes and how it is launched: one description for PyTorch, the driver API and TensorRT.

A kernel's arguments are its inputs, then int32 sizes, then its outputs, always in this order, since that is how a TensorRT quick plugin
calls one. Shapes, sizes and the grid are expressions over the symbols of the input shapes (``"(P + 63) // 64"``), so one contract serves
every input size. ``KernelSpec`` stands beside a kernel's source; ``Contract`` is what an engine directory keeps beside its PTX.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ALIGNMENT", "PRECISIONS", "ArgumentSpec", "Contract", "ContractError", "KernelSpec", "Launch", "bind", "evaluate"]

PRECISIONS = ("fp32", "fp16", "bf16")
ALIGNMENT = 16  # bytes; kernels are compiled for pointers that allow the widest loads
OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


class ContractError(ValueError):
    """Inputs, or a contract file, that do not fit the kernel; the message says which and why."""


@dataclass(frozen=True)
class ArgumentSpec:
    """A tensor argument: ``dtype`` is T (the precision), float32, int64, int32 or bool; ``shape`` holds an expression per dimension."""

    name: str
    dtype: str
    shape: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True)
class KernelSpec:
    """A kernel in the Triton language with its arguments.

    ``sizes`` are the int32 arguments by name. ``static`` symbols (widths, head counts) and ``attributes`` are compiled in. ``constants``
    gives the kernel's compile-time parameters from these and the precision; the grid may use them too.
    """

    op: str
    kernel: Any
    inputs: tuple[ArgumentSpec, ...]
    sizes: Mapping[str, str]
    outputs: tuple[ArgumentSpec, ...]
    grid: tuple[str, str, str]
    constants: Callable[[Mapping[str, Any], str], dict[str, Any]]
    static: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Launch:
    """A contract applied to input shapes; ``sizes`` are the int32 arguments."""

    grid: tuple[int, int, int]
    sizes: tuple[int, ...]
    output_shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Contract:
    """One compiled kernel: everything that a launcher needs beside the PTX."""

    op: str
    precision: str
    target: str  # compute capability, "9.0"
    kernel: str  # entry of the PTX
    ptx: str  # file names relative to the contract's own
    cubin: str
    inputs: tuple[ArgumentSpec, ...]
    sizes: Mapping[str, str]
    outputs: tuple[ArgumentSpec, ...]
    grid: tuple[str, str, str]
    block: tuple[int, int, int]
    shared_bytes: int
    static: Mapping[str, int]  # symbols that are compiled in; inputs must have these sizes
    attributes: Mapping[str, float]  # compiled in likewise
    constants: Mapping[str, int]  # what the grid's expressions use beside symbols

    def launch(self, shapes: Sequence[Sequence[int]]) -> Launch:
        """Grid, sizes and output shapes for inputs of these shapes.

        Raises:
            ContractError: they do not fit this kernel.
        """
        symbols = bind(self.inputs, shapes)
        for name, size in self.static.items():
            if symbols[name] != size:
                raise ContractError(f"{self.op}: compiled for {name} = {size}, got {symbols[name]}; compile it for this model's shape")
        names = {**symbols, **self.constants}
        grid_x, grid_y, grid_z = (evaluate(size, names) for size in self.grid)
        outputs = tuple(tuple(evaluate(size, symbols) for size in argument.shape) for argument in self.outputs)
        return Launch((grid_x, grid_y, grid_z), tuple(evaluate(size, symbols) for size in self.sizes.values()), outputs)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Contract:
        """Read a contract back.

        Raises:
            ContractError: fields are missing, unknown or of the wrong kind.
        """
        try:
            arguments = {key: tuple(ArgumentSpec(**{**a, "shape": tuple(a["shape"])}) for a in values[key]) for key in ("inputs", "outputs")}
            return cls(**{**values, **arguments, "grid": tuple(values["grid"]), "block": tuple(values["block"])})
        except (KeyError, TypeError) as error:
            raise ContractError(f"not a kernel contract: {error}") from None


def evaluate(expression: str, symbols: Mapping[str, Any], *, constant: Callable[[int], Any] = int) -> Any:
    """Value of an expression of names, integers, ``+ - * //`` and parentheses.

    Args:
        symbols: what the names stand for: integers, or the symbolic sizes of a graph compiler.
        constant: turns a literal into the same kind.

    Raises:
        ContractError: another operation, or an unknown name.
    """

    def visit(node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id in symbols:
            value = symbols[node.id]
            return constant(value) if isinstance(value, int) else value
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return constant(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](visit(node.left), visit(node.right))
        raise ContractError(f"{expression!r}: only + - * // of {', '.join(symbols)} and integers")

    try:
        return visit(ast.parse(expression, mode="eval").body)
    except SyntaxError:
        raise ContractError(f"{expression!r}: not an expression") from None


def bind(inputs: Sequence[ArgumentSpec], shapes: Sequence[Sequence[Any] | None]) -> dict[str, Any]:
    """Symbols from the shapes of the inputs; None stands for an absent optional input.

    Raises:
        ContractError: an input is missing, has another rank, or two inputs disagree.
    """
    if len(inputs) != len(shapes):
        raise ContractError(f"takes {len(inputs)} inputs ({', '.join(i.name for i in inputs)}), got {len(shapes)}")
    symbols: dict[str, Any] = {}
    for argument, shape in zip(inputs, shapes, strict=True):
        if shape is None:
            if not argument.optional:
                raise ContractError(f"{argument.name}: missing")
            continue
        if len(shape) != len(argument.shape):
            raise ContractError(f"{argument.name}: must be [{', '.join(argument.shape)}], got {len(shape)} dimensions")
        for name, size in zip(argument.shape, shape, strict=True):
            known = symbols.setdefault(name, size) if name.isidentifier() else evaluate(name, {})
            if isinstance(size, int) and isinstance(known, int) and known != size:
                raise ContractError(f"{argument.name}: must be [{', '.join(argument.shape)}] with {name} = {known}, got {size}")
    return symbols
