"""The PTX of every op, precision and target, run by its contract alone in an emulator, against the references; and what the emulator refuses."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated_kernel import EmulatedKernel
from ptx_emulator import EmulationError, Kernel
from ptx_machine import GARBAGE
from torch import Tensor
from vflow.plugins.compaction import gather_tokens, group_tokens, keep_top, merge_tokens
from vflow.plugins.compile import read_contracts
from vflow.plugins.contract import PRECISIONS, Contract
from vflow.plugins.entropy import patch_entropy
from vflow.plugins.guidance import KEY_BLOCK
from vflow.plugins.importance import row_log_sum_exp
from vflow.plugins.launch import PRECISION_OF

DTYPES = {name: dtype for dtype, name in PRECISION_OF.items()}
ROUNDING = {"fp32": 2e-6, "fp16": 2**-10, "bf16": 2**-7}
SCORES = {"atol": 1e-6, "rtol": 2e-5}
EXACT = {"atol": 0.0, "rtol": 0.0}


def normal(contract: Contract, *shape: int) -> Tensor:
    return torch.randn(shape).to(DTYPES[contract.precision])


Normal = Callable[..., Tensor]
Case = tuple[list[Tensor], list[Tensor], dict[str, float]]  # inputs, expected outputs, tolerances


def scoring(contract: Contract, normal: Normal) -> Case:
    """More than a tile of rows and of keys, neither a multiple of one."""
    width, scale = contract.static["D"], contract.attributes["scale"]
    query, key = normal(2, 70, width) * 2, normal(2, 131, width)
    lse = row_log_sum_exp(query, key, scale=scale)
    if contract.op == "RowLogSumExp":
        return [query, key], [lse], SCORES
    mask = torch.rand(70) < 0.5
    rows = torch.exp(query.double() @ key.double().transpose(1, 2) * scale - lse[:, :, None].double())
    return [query, key, lse, mask], [rows[:, mask].mean(1).float()], SCORES


def selection(contract: Contract, normal: Normal) -> Case:
    """More tokens than a tile, with ties; cells of several tokens and empty ones."""
    tokens, count = 2500, 250
    importance, length = torch.randint(0, 300, (tokens,)) / 300, torch.zeros(count, dtype=torch.int32)
    if contract.op == "KeepTop":
        return [importance, length], [keep_top(importance, count)], EXACT
    cell, cells = torch.randint(0, 190, (tokens,)), torch.arange(200)
    *selected, home = torch.ops.vflow.keep_top_per_cell(importance, cell, cells, length)
    if contract.op == "KeepTopPerCell":
        return [importance, cell, cells, length], [*selected, home], EXACT
    return selected, list(group_tokens(*selected)), EXACT


def merging(contract: Contract, normal: Normal) -> Case:
    """Large groups, the largest small one, pairs, tokens alone and tokens of no group."""
    survivors, tokens = 90, 460
    slot = torch.full((tokens,), -1)
    slot[:survivors] = torch.arange(survivors)
    slot[100:300] = 7
    slot[300:350] = torch.arange(50) + 20
    slot[350:381], slot[381:413] = 3, 5  # 32 and 33 in all
    index, members = torch.arange(survivors), torch.bincount(slot[slot >= 0], minlength=survivors)
    features, importance = normal(tokens, contract.static["F"]), torch.rand(tokens) - 0.2
    given = [features, importance, index, slot, members, *group_tokens(index, slot, members)]
    return given, list(merge_tokens(*given)), {"atol": ROUNDING[contract.precision], "rtol": ROUNDING[contract.precision]}


def gathering(contract: Contract, normal: Normal) -> Case:
    hidden, cos, sin = normal(1, 50, contract.static["C"]), normal(1, 50, contract.static["E"]), normal(1, 50, contract.static["E"])
    key, index = torch.rand(50), torch.tensor([0, 3, 4, 17, 49])
    return [hidden, cos, sin, key, index], list(gather_tokens(hidden, cos, sin, key, index)), EXACT


def guidance(contract: Contract, normal: Normal) -> Case:
    heads, key_heads, width = (contract.static[name] for name in ("H", "KV", "D"))
    length, scale = 3 * KEY_BLOCK + 22, contract.attributes["scale"]
    query, key, visual = normal(heads, width) * 2, normal(key_heads, length, width), torch.rand(length) < 0.8
    visual[KEY_BLOCK : 2 * KEY_BLOCK] = False
    block_lse = torch.ops.vflow.last_token_log_sum_exp(query, key, visual, scale)
    if contract.op == "LastTokenLogSumExp":
        return [query, key, visual], [block_lse], SCORES
    return [query, key, visual, block_lse], [torch.ops.vflow.last_token_attention(query, key, visual, block_lse, scale)], SCORES


def entropy(contract: Contract, normal: Normal) -> Case:
    """Pixels exact in any precision: 6 bits, scaled by 1/256 alone."""
    patches = (torch.rand(5, contract.static["K"]) * 64).floor().div(256).to(DTYPES[contract.precision])
    mean, deviation = torch.zeros(3), torch.full((3,), 256 / 255)
    return [patches, mean, deviation], [patch_entropy(patches, mean, deviation)], SCORES


CASES: dict[str, Callable[[Contract, Normal], Case]] = {
    "RowLogSumExp": scoring, "MaskedColumnMean": scoring, "PatchEntropy": entropy, "KeepTop": selection, "KeepTopPerCell": selection,
    "GroupTokens": selection, "MergeTokens": merging, "GatherTokens": gathering, "LastTokenLogSumExp": guidance,
    "LastTokenAttention": guidance,
}  # fmt: skip


@pytest.mark.parametrize(("op", "precision"), [(op, p) for op in CASES for p in PRECISIONS if p == "fp32" or CASES[op] is not selection])
def test_emitted_kernels_compute_what_the_references_do(
    compiled: dict[str, Path], compiled_entropy: dict[str, Path], op: str, precision: str
) -> None:
    """Targets with the same instructions are run once."""
    folder = (compiled_entropy if op == "PatchEntropy" else compiled)[precision]
    programs: dict[str, Contract] = {}
    for contract in read_contracts(folder):
        if contract.op == op:
            ptx = (folder / contract.ptx).read_text()
            programs.setdefault(re.sub(r"\.(target|version).*", "", ptx), contract)
    assert programs
    for contract in programs.values():
        torch.manual_seed(1)
        inputs, expected, tolerance = CASES[op](contract, partial(normal, contract))
        actual = EmulatedKernel(contract, folder)(*inputs)
        for output, reference in zip(actual, expected, strict=True):
            torch.testing.assert_close(output, reference, **tolerance, msg=lambda text, name=contract.ptx: f"{name}: {text}")


@pytest.mark.parametrize("hasty", [r"\tcp\.async\.wait_group.*", r"(?s)\{\s*\.reg \.pred complete;.*?\}"])
def test_products_and_their_operands_must_be_waited_for(compiled: dict[str, Path], tmp_path: Path, hasty: str) -> None:
    """Without, they come too late: the scores are wrong, or it is seen that somebody writes there."""
    contract = next(c for c in read_contracts(compiled["fp16"]) if (c.op, c.target) == ("RowLogSumExp", "10.0"))
    ptx, found = re.subn(hasty, "", (compiled["fp16"] / contract.ptx).read_text())
    assert found
    (tmp_path / contract.ptx).write_text(ptx)
    inputs, (expected,), _ = scoring(contract, partial(normal, contract))
    with contextlib.suppress(EmulationError):
        (actual,) = EmulatedKernel(contract, tmp_path)(*inputs)
        assert not torch.allclose(actual, expected, rtol=1e-2)


@pytest.mark.parametrize("op", ["RowLogSumExp", "KeepTopPerCell", "GroupTokens", "MergeTokens", "LastTokenAttention", "LastTokenLogSumExp"])
def test_kernels_without_their_barriers_are_refused(compiled: dict[str, Path], tmp_path: Path, op: str) -> None:
    contract = next(c for c in read_contracts(compiled["fp16"]) if (c.op, c.target, c.precision) == (op, "8.0", "fp16"))
    ptx = (compiled["fp16"] / contract.ptx).read_text()
    (tmp_path / contract.ptx).write_text(re.sub(r"\tbar\.sync.*", "", ptx))
    inputs, _, _ = CASES[op](contract, partial(normal, contract))
    with pytest.raises(EmulationError, match=r"another thread|two threads"):
        EmulatedKernel(contract, tmp_path)(*inputs)


def test_the_program_says_what_kernels_do(compiler_environment: dict[str, str]) -> None:
    command = [sys.executable, str(Path(__file__).with_name("emulate.py")), "--size", "tiny", "--ops", "MergeTokens", "GatherTokens"]
    done = subprocess.run(command, env=compiler_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    merge, gather = done.stdout.splitlines()
    assert re.match(r"MergeTokens fp16 9.0 right, [0-9.]+ million instructions of a warp; features \[21, 40\] of 1,680 bytes: \d", merge)
    assert "hidden [1, 21, 40] of 1,680 bytes: 1,600 read, 0 written" in gather  # of 10 rows, each column by two threads
    assert "hidden_kept [1, 10, 40] of 800 bytes: 0 read, 800 written" in gather


KERNEL = """
.version 8.3
.target sm_80
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
.param .u64 .ptr .global .align 1 kernel_param_0,
.param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid 64
{{
    .reg .pred %p<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.wide.u32 %rd3, %r1, 4, %rd1;  // this thread's number
    mad.wide.u32 %rd4, %r1, 4, %rd2;
    shl.b32 %r3, %r1, 2;
    mov.b32 %r4, global_smem;
    add.s32 %r3, %r3, %r4;            // this thread's place in shared memory
    xor.b32 %r5, %r3, 128;            // that of a thread of the other warp
    setp.lt.u32 %p1, %r1, 40;         // a part of the second warp
    {body}
    ret;
}}
"""


def run(body: str, *, blocks: int = 1) -> np.ndarray[Any, Any]:
    """What a kernel of 64 threads makes of 0, 1, …, 63."""
    source, target = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    Kernel(KERNEL.format(body=body)).run((blocks, 1, 1), 256, [source, target])
    return target


LOAD = "ld.global.b32 %r6, [%rd3];"
EXCHANGE = "st.shared.b32 [%r3], %r6; {between} ld.shared.b32 %r7, [%r5]; st.global.b32 [%rd4], %r7;"
COPY = "cp.async.ca.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x4; cp.async.commit_group;"


def test_threads_exchange_what_a_barrier_lies_between() -> None:
    np.testing.assert_array_equal(run(LOAD + EXCHANGE.format(between="bar.sync 0;")), np.arange(64) ^ 32)


def test_threads_meet_again_behind_a_branch() -> None:
    body = LOAD + "@%p1 bra $low; add.s32 %r6, %r6, 100; bra $end; $low: add.s32 %r6, %r6, 200; $end: redux.sync.max.s32 %r6, %r6, -1;"
    np.testing.assert_array_equal(run(body + "st.global.b32 [%rd4], %r6;"), [231] * 32 + [239] * 32)


def test_copies_arrive_when_they_are_waited_for() -> None:
    waiting = COPY + "cp.async.wait_group 0; bar.sync 0; ld.shared.b32 %r7, [%r5]; st.global.b32 [%rd4], %r7;"
    np.testing.assert_array_equal(run(waiting), np.arange(64) ^ 32)
    not_waiting = waiting.replace("cp.async.wait_group 0;", "cp.async.wait_group 1;")
    np.testing.assert_array_equal(run(not_waiting), [int.from_bytes(bytes([GARBAGE] * 4), "little")] * 64)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (LOAD + EXCHANGE.format(between=""), "shared memory is read while another thread writes it"),
        (LOAD + "ld.shared.b32 %r7, [%r5]; st.shared.b32 [%r3], %r6;", "shared memory is written while another thread reads it"),
        (LOAD + "st.global.b32 [%rd2], %r6;", "kernel_param_1 is written by two threads"),
        ("ld.shared.b32 %r7, [%r5];" + COPY, "shared memory is written while another thread reads it"),
        (COPY + "cp.async.wait_group 0; ld.shared.b32 %r7, [%r5];", "shared memory is read while another thread writes it"),
        ("red.global.gpu.relaxed.add.u32 [%rd2], 1; ld.global.b32 %r7, [%rd2];", "kernel_param_1 is read while another thread writes it"),
        ("ld.global.b32 %r6, [%rd3+4];", "bytes 4 to 260 of kernel_param_0, which has 256"),
        ("ld.global.b32 %r6, [%rd1+2];", "no multiple of 4"),
        ("mov.b64 %rd5, 64; ld.global.b32 %r6, [%rd5];", "0x40 lies in no argument"),
        ("@%p1 bra $end; bar.sync 0; $end:", "a part of a warp never comes .*bar.sync"),
        ("@%p1 bra $end; redux.sync.max.s32 %r6, %r1, -1; $end:", "a part of a warp never comes .*redux.sync"),
        ("lop3.b32 %r6, %r1, %r1, %r1, 150;", r"not emulated: lop3\.b32"),
    ],
)
def test_what_a_gpu_would_do_in_silence_is_refused(body: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        run(body)


def test_blocks_have_no_order() -> None:
    with pytest.raises(EmulationError, match=r"kernel_param_1 is read while another thread writes it \(block \(1, 0, 0\)"):
        run("ld.global.b32 %r7, [%rd4]; add.s32 %r7, %r7, 1; st.global.b32 [%rd4], %r7;", blocks=2)
