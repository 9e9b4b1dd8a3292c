"""Runs emitted kernels in the emulator on the inputs of ``tools/gpu_check.py``: whether they are right, and how much they do.

    python tests/plugins/emulate.py --size tower --ops MergeTokens --target 9.0

The size ``large`` takes minutes an op. Counts are of PTX, of which an assembler leaves out a few moves; they repeat on any machine. The exit code
is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import torch
from emulated_kernel import EmulatedKernel
from gpu_cases import SIZES, Case, cases
from gpu_check import compare, compile_case
from vflow.plugins.compile import TARGETS
from vflow.plugins.launch import PRECISION_OF


def emulate(case: Case, precision: str, target: str, folder: Path) -> tuple[bool, str]:
    """Whether one kernel is right, and a line about it."""
    contract = compile_case(case, precision, target, folder)
    emulated = EmulatedKernel(contract, folder)
    tensors = [tensor.contiguous() for tensor in case.inputs]
    outputs = emulated(*tensors)
    right = compare(case, outputs, case.expected())["passed"]
    moved = [
        f"{argument.name} {list(tensor.shape)} of {len(memory.data):,} bytes: {memory.loaded:,} read, {memory.stored:,} written"
        for argument, tensor, memory in zip((*contract.inputs, *contract.outputs), (*tensors, *outputs), emulated.memories, strict=True)
    ]
    issued = f"{emulated.kernel.instructions / 1e6:.4g} million instructions of a warp"
    return right, "; ".join([f"{contract.op} {precision} {target} {'right' if right else 'WRONG'}, {issued}", *moved])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="odd")
    parser.add_argument("--ops", nargs="+", help="all unless given")
    parser.add_argument("--precision", choices=PRECISION_OF.values(), default="fp16")
    parser.add_argument("--target", choices=TARGETS, default="9.0")
    options = parser.parse_args()
    passed = True
    dtype = {name: dtype for dtype, name in PRECISION_OF.items()}[options.precision]
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(SIZES[options.size], dtype, torch.device("cpu"), seed=0):
            if options.ops is None or case.spec.op in options.ops:
                right, line = emulate(case, options.precision, options.target, Path(folder))
                print(line, flush=True)
                passed &= right
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
