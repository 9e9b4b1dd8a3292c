"""The PyTorch operators of the domain: references on the CPU, shapes for tracing, kernels named for CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vflow.plugins.compaction
import vflow.plugins.entropy
import vflow.plugins.guidance
import vflow.plugins.importance  # noqa: F401  # registering
from vflow.plugins import torch_ops
from vflow.plugins.compaction import group_tokens, keep_top_per_cell, merge_tokens
from vflow.plugins.importance import context_relevance


def arguments(name: str) -> tuple[list[torch.Tensor | None], dict[str, Any], str]:
    """Tensors, numbers, and the kernel of each operator."""
    query, key = torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    importance, cell, cells = torch.rand(9), torch.arange(9) // 3, torch.arange(3)
    survivors = torch.zeros(4, dtype=torch.int32)
    index, slot, members = keep_top_per_cell(importance, cell, cells, 4)
    merging = [torch.randn(9, 5), importance, index, slot, members, *group_tokens(index, slot, members)]
    everyone = torch.ones(9, dtype=torch.bool)
    cases: dict[str, tuple[list[torch.Tensor | None], dict[str, Any], str]] = {
        "row_log_sum_exp": ([query, key, None], {"scale": 0.5}, "importance_kernels:ROW_LOG_SUM_EXP"),
        "masked_column_mean": ([query, key, torch.zeros(2, 9), everyone, None], {"scale": 0.5}, "importance_kernels:MASKED_COLUMN_MEAN"),
        "last_token_log_sum_exp": ([query[:, 0], key, everyone], {"scale": 0.5}, "guidance_kernels:LAST_TOKEN_LOG_SUM_EXP"),
        "last_token_attention": ([query[:, 0], key, everyone, torch.zeros(2, 1)], {"scale": 0.5}, "guidance_kernels:LAST_TOKEN_ATTENTION"),
        "keep_top": ([importance, survivors], {}, "selection_kernels:KEEP_TOP"),
        "keep_top_per_cell": ([importance, cell, cells, survivors], {}, "selection_kernels:KEEP_TOP_PER_CELL"),
        "group_tokens": ([index, slot, members], {}, "selection_kernels:GROUP_TOKENS"),
        "merge_tokens": (merging, {"floor": 1e-8}, "compaction_kernels:MERGE_TOKENS"),
        "gather_tokens": ([query, key, key, importance, index], {}, "compaction_kernels:GATHER_TOKENS"),
        "patch_entropy": ([torch.randn(5, 12), torch.zeros(3), torch.ones(3)], {}, "entropy_kernels:PATCH_ENTROPY"),
    }
    return cases[name]


OPERATORS = [
    "row_log_sum_exp", "masked_column_mean", "last_token_log_sum_exp", "last_token_attention", "keep_top", "keep_top_per_cell", "group_tokens",
    "merge_tokens", "gather_tokens", "patch_entropy",
]  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.filterwarnings("ignore:divide by zero")  # heads beyond the last, which are not stored
def test_operator_reference_shapes_and_kernel_agree(name: str) -> None:
    tensors, numbers, kernel = arguments(name)
    operator = getattr(torch.ops.vflow, name)
    torch.library.opcheck(operator, (*tensors, *numbers.values()), test_utils=("test_schema", "test_faketensor"))
    outputs = operator(*tensors, *numbers.values())
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    for output, by_kernel in zip(outputs, torch_ops._launch(kernel, (*tensors, *numbers.values()), {}), strict=True):
        torch.testing.assert_close(by_kernel, output)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_has_a_kernel_for_cuda(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vflow::{name}", "CUDA")


def test_programs_with_the_operators_are_compiled_as_one_graph() -> None:
    def program(query: torch.Tensor, key: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        relevance = context_relevance(query, key, scale=0.5, global_threshold=1.0)
        cells = torch.arange(4)
        index, slot, members = keep_top_per_cell(relevance, torch.arange(16) // 4, cells, 6)
        return merge_tokens(features, relevance, index, slot, members, *group_tokens(index, slot, members))[0]

    inputs = torch.randn(2, 16, 8), torch.randn(2, 16, 8), torch.randn(16, 5)
    whole = torch.compile(program, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(*inputs), program(*inputs))
