"""Text guidance: how much the last prompt token looks at each visual token (docs/algorithm.md, section 6).

    LastTokenAttention    g_j = mean_h softmax_j(scale · q_h · k_{h,j}) over the visual j, 0 elsewhere      [S]

One row of one layer's attention, so no map. Grouped-query: heads share keys in runs of H / KV. Beyond the paper; off by default.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .node import emit, function_body, is_tracing
from .torch_ops import register

__all__ = ["FUNCTIONS", "last_token_attention"]

MASKED = -1e30  # finite, so that a row without visual tokens gives numbers (unused) and not NaN


def last_token_attention(query: Tensor, key: Tensor, is_visual: Tensor, *, scale: float) -> Tensor:
    """Attention of one query to the visual keys, mean over heads.

    Args:
        query: [H, D], of the last token; key: [KV, S, D], of this call's tokens; is_visual: bool [S].

    Returns:
        float32 [S]; sums to 1 where there is a visual token.
    """
    if is_tracing():
        output = (torch.float32, is_visual.shape)
        return emit("LastTokenAttention", (query, key, is_visual), {"scale": scale}, [output])[0]
    attention: Tensor = _last_token_attention(query, key, is_visual, scale)
    return attention


def _reference(query: Tensor, key: Tensor, is_visual: Tensor, scale: float) -> Tensor:
    grouped = query.float().reshape(key.shape[0], -1, key.shape[2])  # [KV, H/KV, D]
    scores = grouped @ key.float().transpose(1, 2) * scale  # [KV, H/KV, S]
    attention = torch.softmax(torch.where(is_visual, scores, MASKED), -1)
    return torch.where(is_visual, attention.mean((0, 1)), 0.0)


_last_token_attention = register(
    "last_token_attention(Tensor query, Tensor key, Tensor is_visual, float scale) -> Tensor",
    _reference,
    lambda query, key, is_visual, scale: query.new_empty(is_visual.shape, dtype=torch.float32),
    "guidance_kernels:LAST_TOKEN_ATTENTION",
)


LAST_TOKEN_ATTENTION = function_body("""
LastTokenAttention <scale: float>(query, key, is_visual) => (attention) {
    query_float = Cast <to: int = 1>(query)
    key_float = Cast <to: int = 1>(key)
    kv_dim = Shape <start: int = 0, end: int = 1>(key)
    width_dim = Shape <start: int = 2, end: int = 3>(key)
    rest = Constant <value_ints: ints = [-1]>()
    grouped_shape = Concat <axis: int = 0>(kv_dim, rest, width_dim)
    grouped = Reshape(query_float, grouped_shape)
    key_columns = Transpose <perm: ints = [0, 2, 1]>(key_float)
    products = MatMul(grouped, key_columns)
    scale_value = Constant <value_float: float = @scale>()
    scores = Mul(products, scale_value)
    masked = Constant <value_float: float = -1e30>()
    visible = Where(is_visual, scores, masked)
    shares = Softmax <axis: int = -1>(visible)
    head_axes = Constant <value_ints: ints = [0, 1]>()
    mean = ReduceMean <keepdims: int = 0>(shares, head_axes)
    zero = Constant <value_float: float = 0.0>()
    attention = Where(is_visual, mean, zero)
}
""")

FUNCTIONS = (LAST_TOKEN_ATTENTION,)
