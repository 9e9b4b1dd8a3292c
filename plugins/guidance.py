"""Text guidance: how much the last prompt token looks at each visual token (docs/algorithm.md, section 6).

    LastTokenLogSumExp    λ_hb = log Σ_j exp(scale · q_h · k_hj) over the visual j of block b of the keys            [H, B]
    LastTokenAttention    g_j = mean_h exp(scale · q_h · k_hj − log Σ_b exp λ_hb) for the visual j, 0 elsewhere       [S]

One row of one layer's attention, so no map. Two ops, because a kernel that had to find its own denominators would read all keys once for every
tile of columns. Grouped-query: heads share keys in runs of H / KV. Beyond the paper; off by default.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .node import emit, function_body, is_tracing
from .torch_ops import register

__all__ = ["FUNCTIONS", "KEY_BLOCK", "last_token_attention"]

MASKED = -1e30  # finite, so that a row without visual tokens gives numbers (unused) and not NaN
KEY_BLOCK = 128  # keys of which one λ is taken


def last_token_attention(query: Tensor, key: Tensor, is_visual: Tensor, *, scale: float) -> Tensor:
    """Attention of one query to the visual keys, mean over heads.

    Args:
        query: [H, D], of the last token; key: [KV, S, D], of this call's tokens; is_visual: bool [S].

    Returns:
        float32 [S]; sums to 1 where there is a visual token.
    """
    given = query, key, is_visual
    if is_tracing():
        blocks = (torch.float32, (query.shape[0], (is_visual.shape[0] + KEY_BLOCK - 1) // KEY_BLOCK))
        block_lse = emit("LastTokenLogSumExp", given, {"scale": scale}, [blocks])[0]
        return emit("LastTokenAttention", (*given, block_lse), {"scale": scale}, [(torch.float32, is_visual.shape)])[0]
    attention: Tensor = _last_token_attention(*given, _last_token_log_sum_exp(*given, scale), scale)
    return attention


def _scores(query: Tensor, key: Tensor, is_visual: Tensor, scale: float) -> Tensor:
    """float32 [H, S], MASKED where a token is not visual."""
    grouped = query.float().reshape(key.shape[0], -1, key.shape[2])  # [KV, H/KV, D]
    products = (grouped @ key.float().transpose(1, 2)).reshape(query.shape[0], -1)
    return torch.where(is_visual, products * scale, MASKED)


def _reference_log_sum_exp(query: Tensor, key: Tensor, is_visual: Tensor, scale: float) -> Tensor:
    scores = _scores(query, key, is_visual, scale)
    padded = torch.nn.functional.pad(scores, (0, -scores.shape[1] % KEY_BLOCK), value=MASKED)
    return torch.logsumexp(padded.reshape(scores.shape[0], -1, KEY_BLOCK), 2)


def _reference_attention(query: Tensor, key: Tensor, is_visual: Tensor, block_lse: Tensor, scale: float) -> Tensor:
    attention = torch.exp(_scores(query, key, is_visual, scale) - torch.logsumexp(block_lse, 1, keepdim=True))
    return torch.where(is_visual, attention.mean(0), 0.0)


_last_token_log_sum_exp = register(
    "last_token_log_sum_exp(Tensor query, Tensor key, Tensor is_visual, float scale) -> Tensor",
    _reference_log_sum_exp,
    lambda query, key, is_visual, scale: query.new_empty((query.shape[0], (is_visual.shape[0] + KEY_BLOCK - 1) // KEY_BLOCK), dtype=torch.float32),
    "guidance_kernels:LAST_TOKEN_LOG_SUM_EXP",
)
_last_token_attention = register(
    "last_token_attention(Tensor query, Tensor key, Tensor is_visual, Tensor block_lse, float scale) -> Tensor",
    _reference_attention,
    lambda query, key, is_visual, block_lse, scale: query.new_empty(is_visual.shape, dtype=torch.float32),
    "guidance_kernels:LAST_TOKEN_ATTENTION",
)


SCORES = """
    query_float = Cast <to: int = 1>(query)
    key_float = Cast <to: int = 1>(key)
    kv_dim = Shape <start: int = 0, end: int = 1>(key)
    width_dim = Shape <start: int = 2, end: int = 3>(key)
    rest = Constant <value_ints: ints = [-1]>()
    grouped_shape = Concat <axis: int = 0>(kv_dim, rest, width_dim)
    grouped = Reshape(query_float, grouped_shape)
    key_columns = Transpose <perm: ints = [0, 2, 1]>(key_float)
    products = MatMul(grouped, key_columns)
    heads = Shape <start: int = 0, end: int = 1>(query)
    length = Shape(is_visual)
    rows_shape = Concat <axis: int = 0>(heads, length)
    rows = Reshape(products, rows_shape)
    scale_value = Constant <value_float: float = @scale>()
    scaled = Mul(rows, scale_value)
    masked = Constant <value_float: float = -1e30>()
    scores = Where(is_visual, scaled, masked)
    last = Constant <value_ints: ints = [-1]>()
"""

# log Σ exp over the last axis, which stays.
LOG_SUM_EXP = """
    peak = ReduceMax <keepdims: int = 1>({values}, last)
    below = Sub({values}, peak)
    powers = Exp(below)
    power_sum = ReduceSum <keepdims: int = 1>(powers, last)
    logarithm = Log(power_sum)
    lse = Add(peak, logarithm)
"""

LAST_TOKEN_LOG_SUM_EXP = function_body(
    "LastTokenLogSumExp <scale: float>(query, key, is_visual) => (block_lse) {"
    + SCORES
    + f"""
    block = Constant <value_ints: ints = [{KEY_BLOCK}]>()
    block_less_one = Constant <value_ints: ints = [{KEY_BLOCK - 1}]>()
    rounded = Add(length, block_less_one)
    blocks = Div(rounded, block)
    whole = Mul(blocks, block)
    missing = Sub(whole, length)
    no_padding = Constant <value_ints: ints = [0, 0, 0]>()
    padding = Concat <axis: int = 0>(no_padding, missing)
    padded = Pad(scores, padding, masked)
    blocked_shape = Concat <axis: int = 0>(heads, blocks, block)
    blocked = Reshape(padded, blocked_shape)
"""
    + LOG_SUM_EXP.format(values="blocked")
    + """
    block_lse = Squeeze(lse, last)
}
"""
)

LAST_TOKEN_ATTENTION = function_body(
    "LastTokenAttention <scale: float>(query, key, is_visual, block_lse) => (attention) {"
    + SCORES
    + LOG_SUM_EXP.format(values="block_lse")
    + """
    over = Sub(scores, lse)
    shares = Exp(over)
    head_axis = Constant <value_ints: ints = [0]>()
    mean = ReduceMean <keepdims: int = 0>(shares, head_axis)
    zero = Constant <value_float: float = 0.0>()
    attention = Where(is_visual, mean, zero)
}
"""
)

FUNCTIONS = (LAST_TOKEN_LOG_SUM_EXP, LAST_TOKEN_ATTENTION)
