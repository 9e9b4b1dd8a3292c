"""A launcher with the emulator in place of the CUDA driver: a compiled kernel on CPU tensors, by its contract alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from ptx_emulator import Kernel
from ptx_machine import GARBAGE, Memory
from torch import Tensor
from vflow.plugins.contract import Contract, Launch
from vflow.plugins.driver import DriverKernel

__all__ = ["EmulatedKernel"]


class EmulatedKernel(DriverKernel):
    """``kernel`` and ``memories`` tell afterwards what was executed, and what was read and written of each tensor."""

    def __init__(self, contract: Contract, folder: Path) -> None:
        self.kernel = Kernel((folder / contract.ptx).read_text(encoding="ascii"))
        self.memories: list[Memory] = []
        driver = SimpleNamespace(cuModuleLoadData=lambda image: (0, self.kernel), cuModuleGetFunction=lambda module, name: (0, module))
        super().__init__(contract, folder, driver=driver)

    def _launch(self, plan: Launch, inputs: Sequence[Tensor], outputs: Sequence[Tensor], stream: int) -> None:
        for output in outputs:
            output.view(torch.uint8).fill_(GARBAGE)
        given, made = ([tensor.view(torch.uint8).numpy() for tensor in tensors] for tensors in (inputs, outputs))
        assert self.kernel.threads == self.contract.block[0]
        self.memories = self.kernel.run(plan.grid, self.contract.shared_bytes, [*given, *plan.sizes, *made])
