"""Runs a compiled kernel through the CUDA driver API, from its PTX or cubin and its contract alone.

What a runtime without the Triton language does; here it proves that the files of an engine directory are enough. Tensors are PyTorch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contract import ALIGNMENT, Contract, ContractError, Launch
from .launch import DTYPES, PRECISION_OF

__all__ = ["DriverError", "DriverKernel"]


class DriverError(RuntimeError):
    """The CUDA driver refused a call; the message holds its name for the error."""


class DriverKernel:
    """One kernel, loaded into the current device's context.

    Args:
        contract: from ``read_contracts``; folder: where its files are.
        assembled: load the cubin instead of the PTX, which the driver translates.
        driver: ``cuda.bindings.driver``, or what stands in for it in tests.

    Raises:
        DriverError: no driver, or it refuses the file (too old for the PTX version, another architecture).
    """

    def __init__(self, contract: Contract, folder: Path, *, assembled: bool = False, driver: Any = None) -> None:
        self.contract, self._driver = contract, driver or _cuda_driver()
        image = (folder / (contract.cubin if assembled else contract.ptx)).read_bytes()
        self._module = self._call(self._driver.cuModuleLoadData, image if assembled else image + b"\0")
        self._function = self._call(self._driver.cuModuleGetFunction, self._module, contract.kernel.encode())

    def __call__(self, *inputs: Tensor, stream: int = 0) -> list[Tensor]:
        """Outputs for contiguous inputs, on ``stream``.

        Raises:
            ContractError: shapes, dtypes, strides or alignment do not fit; DriverError: the launch failed.
        """
        contract = self.contract
        plan = contract.launch([tuple(tensor.shape) for tensor in inputs])
        dtype = next(dtype for dtype, name in PRECISION_OF.items() if name == contract.precision)
        for argument, tensor in zip(contract.inputs, inputs, strict=True):
            expected = DTYPES.get(argument.dtype, dtype)
            if tensor.dtype != expected or not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
                raise ContractError(f"{contract.op}: {argument.name} must be {expected}, contiguous and aligned to {ALIGNMENT} bytes")
        outputs = [
            torch.empty(shape, dtype=DTYPES.get(argument.dtype, dtype), device=inputs[0].device)
            for argument, shape in zip(contract.outputs, plan.output_shapes, strict=True)
        ]
        if 0 not in plan.grid:
            self._launch(plan, inputs, outputs, stream)
        return outputs

    def _launch(self, plan: Launch, inputs: Sequence[Tensor], outputs: Sequence[Tensor], stream: int) -> None:
        values = (*(tensor.data_ptr() for tensor in inputs), *plan.sizes, *(tensor.data_ptr() for tensor in outputs))
        types = (*(ctypes.c_void_p,) * len(inputs), *(ctypes.c_int32,) * len(plan.sizes), *(ctypes.c_void_p,) * len(outputs))
        launch = self._driver.cuLaunchKernel
        self._call(launch, self._function, *plan.grid, *self.contract.block, self.contract.shared_bytes, stream, (values, types), 0)

    def _call(self, function: Any, *arguments: Any) -> Any:
        error, *results = function(*arguments)
        if int(error) != 0:
            raise DriverError(f"{self.contract.op} ({self.contract.precision}, {self.contract.target}): {error}")
        return results[0] if results else None


def _cuda_driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise DriverError("running compiled kernels needs cuda-python: pip install cuda-bindings") from None
    return driver
