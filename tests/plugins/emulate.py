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
from gpu_check import compare
from vflow.plugins.compile import TARGETS, compile_kernel
from vflow.plugins.contract import bind
from vflow.plugins.launch import PRECISION_OF


def emulate(case: Case, precision: str, target: str, folder: Path) -> str:
    """One line about one kernel."""
    spec, tensors = case.spec, [tensor.contiguous() for tensor in case.inputs]
    inputs = [argument for argument in spec.inputs if not argument.optional]
    symbols = bind(inputs, [tuple(tensor.shape) for tensor in tensors])
    contract, ptx, cubin = compile_kernel(spec, {**symbols, **case.attributes}, precision, target)
    (folder / contract.ptx).write_text(ptx)
    (folder / contract.cubin).write_bytes(cubin)
    emulated = EmulatedKernel(contract, folder)
    outputs = emulated(*tensors)
    verdict = "right" if compare(case, outputs, case.expected())["passed"] else "WRONG"
    moved = [
        f"{argument.name} {list(tensor.shape)} of {len(memory.data):,} bytes: {memory.loaded:,} read, {memory.stored:,} written"
        for argument, tensor, memory in zip((*inputs, *spec.outputs), (*tensors, *outputs), emulated.memories, strict=True)
    ]
    issued = f"{emulated.kernel.instructions / 1e6:.4g} million instructions of a warp"
    return "; ".join([f"{spec.op} {precision} {target} {verdict}, {issued}", *moved])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="odd")
    parser.add_argument("--ops", nargs="+", help="all unless given")
    parser.add_argument("--precision", choices=PRECISION_OF.values(), default="fp16")
    parser.add_argument("--target", choices=TARGETS, default="9.0")
    options = parser.parse_args()
    wrong = False
    dtype = next(dtype for dtype, name in PRECISION_OF.items() if name == options.precision)
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(SIZES[options.size], dtype, torch.device("cpu"), seed=0):
            if options.ops is None or case.spec.op in options.ops:
                print(line := emulate(case, options.precision, options.target, Path(folder)), flush=True)
                wrong |= "WRONG" in line
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
