"""Importance scoring: how much attention each patch receives, without the patch × patch map (docs/algorithm.md, section 1).

With A = softmax(Q Kᵀ · scale) of one tower block, row i looking at column j:

    RowLogSumExp        λ_hk = log Σ_j exp(scale · q_hk · k_hj)                                     [H, R]
    MaskedColumnMean    c_j  = mean_h  Σ_k m_k exp(scale · q_hk · k_hj − λ_hk)  /  Σ_k m_k          [P]

The second is used twice: with every row (received attention, over R), then with the rows of the global tokens (context
relevance). VFlowOpt (arXiv 2508.05211), section 3.2.

Both lower to fused attention, which every engine has in O(P) memory: a log-sum-exp can be read off an attention's output
when one more key of known score g has the value 1 and all others 0, since then o = e^g / (e^Z + e^g), so Z = g + log(1/o − 1).
The column sums are again a log-sum-exp, of attention with Q and K swapped and a bias per key; a bias is one more dimension in
which all queries hold 1. Biases are split into two dimensions (value and rounding rest), so that half precision does not
round them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .node import emit, function_body, is_tracing

__all__ = ["FUNCTIONS", "add_entropy", "context_relevance", "masked_column_mean", "row_log_sum_exp"]

ROW_CHUNK = 256  # rows of the map that the reference holds at once


def row_log_sum_exp(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    """Log of the softmax denominator of each attention row.

    Args:
        query: [H, R, D]; key: [H, P, D]; any float dtype, accumulated in float32.

    Returns:
        float32 [H, R].
    """
    if is_tracing():
        return emit("RowLogSumExp", (query, key), {"scale": scale}, [(torch.float32, query.shape[:2])])[0]
    chunks = [torch.logsumexp(_scores(rows, key, scale), -1) for rows in torch.split(query, ROW_CHUNK, 1)]
    return torch.cat(chunks, 1)


def masked_column_mean(query: Tensor, key: Tensor, row_lse: Tensor, row_mask: Tensor, *, scale: float) -> Tensor:
    """Mean of the attention map's columns over the masked rows and all heads.

    Args:
        query: [H, R, D]; key: [H, P, D]; row_lse: float32 [H, R] from ``row_log_sum_exp``; row_mask: bool [R], not all false.

    Returns:
        float32 [P]; sums to 1 over all columns.
    """
    if is_tracing():
        output = (torch.float32, key.shape[1:2])
        return emit("MaskedColumnMean", (query, key, row_lse, row_mask), {"scale": scale}, [output])[0]
    heads, patches = key.shape[:2]
    total = torch.zeros(heads, patches, dtype=torch.float32, device=key.device)
    for rows, lse, mask in zip(torch.split(query, ROW_CHUNK, 1), torch.split(row_lse, ROW_CHUNK, 1), torch.split(row_mask, ROW_CHUNK), strict=True):
        attention = torch.exp(_scores(rows, key, scale) - lse[..., None])  # [H, chunk, P]
        total += (attention * mask.float()[:, None]).sum(1)
    return total.mean(0) / row_mask.sum()


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return query.float() @ key.float().transpose(1, 2) * scale  # [H, R, P]


def context_relevance(query: Tensor, key: Tensor, *, scale: float, global_threshold: float) -> Tensor:
    """Mean attention that each patch receives from the global tokens (paper, section 3.2).

    Global tokens are those that receive more than ``global_threshold`` times the average attention; where there is none, the
    most attended ones (the research code then averages nothing, and NaN ranks first).

    Args:
        query, key: [H, P, D] after rotary embedding.

    Returns:
        float32 [P], sums to 1.
    """
    row_lse = row_log_sum_exp(query, key, scale=scale)
    everyone = torch.ones_like(row_lse[0], dtype=torch.bool)
    mean_received = masked_column_mean(query, key, row_lse, everyone, scale=scale)
    if global_threshold == 0:  # all tokens are global, so this is c already
        return mean_received
    received = mean_received * query.shape[1]  # 1 on average
    is_global = (received > global_threshold) | (received >= received.amax(0))
    return masked_column_mean(query, key, row_lse, is_global, scale=scale)


def add_entropy(relevance: Tensor, entropy: Tensor, *, entropy_weight: float) -> Tensor:
    """s = c + α · softmax(e) (paper, equation 4). Both float32 [P]."""
    if entropy_weight == 0:
        return relevance
    return relevance + entropy_weight * torch.softmax(entropy, 0)


# The score g of the extra key is E[s] under the row's own attention, read off one more fused attention whose values are the keys. Z = E[s] +
# entropy, so g lies within log P below Z whatever the scores: nothing cancels, overflows or vanishes, in half precision either.
# The extra key's value is 32768, not 1: half precision then holds o over 20 e-foldings.
ROW_LOG_SUM_EXP = function_body("""
RowLogSumExp <scale: float>(query, key) => (row_lse) {
    one = Constant <value_float: float = 1.0>()
    zero = Constant <value_float: float = 0.0>()
    scale_value = Constant <value_float: float = @scale>()
    scale_typed = CastLike(scale_value, query)
    zero_typed = CastLike(zero, query)
    one_typed = CastLike(one, query)
    scaled = Mul(query, scale_typed)
    heads_dim = Shape <start: int = 0, end: int = 1>(key)
    rows_dim = Shape <start: int = 1, end: int = 2>(query)
    keys_dim = Shape <start: int = 1, end: int = 2>(key)
    width_dim = Shape <start: int = 2, end: int = 3>(key)
    count = Constant <value_ints: ints = [1]>()
    two = Constant <value_ints: ints = [2]>()
    six = Constant <value_ints: ints = [6]>()
    eight = Constant <value_ints: ints = [8]>()
    batch_axis = Constant <value_ints: ints = [0]>()
    last_axis = Constant <value_ints: ints = [2]>()
    scaled_batch = Unsqueeze(scaled, batch_axis)
    key_alone = Unsqueeze(key, batch_axis)
    attended = Attention <scale: float = 1.0>(scaled_batch, key_alone, key_alone)
    attended_rows = Squeeze(attended, batch_axis)
    attended_float = Cast <to: int = 1>(attended_rows)
    scaled_float = Cast <to: int = 1>(scaled)
    attended_product = Mul(scaled_float, attended_float)
    guess = ReduceSum <keepdims: int = 1>(attended_product, last_axis)
    guess_high = CastLike(guess, query)
    guess_high_float = Cast <to: int = 1>(guess_high)
    guess_rest_float = Sub(guess, guess_high_float)
    guess_rest = CastLike(guess_rest_float, query)
    guess_rest_back = Cast <to: int = 1>(guess_rest)
    guess_used = Add(guess_high_float, guess_rest_back)

    pad_query_shape = Concat <axis: int = 0>(heads_dim, rows_dim, six)
    pad_query = Expand(zero_typed, pad_query_shape)
    wide_query = Concat <axis: int = 2>(scaled, guess_high, guess_rest, pad_query)
    pad_key_shape = Concat <axis: int = 0>(heads_dim, keys_dim, eight)
    pad_key = Expand(zero_typed, pad_key_shape)
    real_key = Concat <axis: int = 2>(key, pad_key)
    extra_zero_shape = Concat <axis: int = 0>(heads_dim, count, width_dim)
    extra_zero = Expand(zero_typed, extra_zero_shape)
    extra_one_shape = Concat <axis: int = 0>(heads_dim, count, two)
    extra_one = Expand(one_typed, extra_one_shape)
    extra_pad_shape = Concat <axis: int = 0>(heads_dim, count, six)
    extra_pad = Expand(zero_typed, extra_pad_shape)
    extra_key = Concat <axis: int = 2>(extra_zero, extra_one, extra_pad)
    wide_key = Concat <axis: int = 1>(real_key, extra_key)

    wide_width = Add(width_dim, eight)
    real_value_shape = Concat <axis: int = 0>(heads_dim, keys_dim, wide_width)
    real_value = Expand(zero_typed, real_value_shape)
    extra_value_shape = Concat <axis: int = 0>(heads_dim, count, wide_width)
    boost = Constant <value_float: float = 32768.0>()
    boost_typed = CastLike(boost, query)
    extra_value = Expand(boost_typed, extra_value_shape)
    wide_value = Concat <axis: int = 1>(real_value, extra_value)

    query_batch = Unsqueeze(wide_query, batch_axis)
    key_batch = Unsqueeze(wide_key, batch_axis)
    value_batch = Unsqueeze(wide_value, batch_axis)
    mixed = Attention <scale: float = 1.0>(query_batch, key_batch, value_batch)
    first = Constant <value_int: int = 0>()
    share = Gather <axis: int = 3>(mixed, first)
    share_float = Cast <to: int = 1>(share)
    odds = Div(boost, share_float)
    rest = Sub(odds, one)
    rest_log = Log(rest)
    rest_rows = Squeeze(rest_log, batch_axis)
    guess_rows = Squeeze(guess_used, last_axis)
    row_lse = Add(guess_rows, rest_rows)
}
""")

# The extra key's score is log(mean column sum) − 3: columns down to a twentieth of the average keep full precision.
MASKED_COLUMN_MEAN = function_body("""
MaskedColumnMean <scale: float>(query, key, row_lse, row_mask) => (column_mean) {
    zero = Constant <value_float: float = 0.0>()
    one = Constant <value_float: float = 1.0>()
    zero_typed = CastLike(zero, query)
    one_typed = CastLike(one, query)
    scale_value = Constant <value_float: float = @scale>()
    scale_typed = CastLike(scale_value, query)
    scaled = Mul(query, scale_typed)
    heads_dim = Shape <start: int = 0, end: int = 1>(key)
    rows_dim = Shape <start: int = 1, end: int = 2>(query)
    keys_dim = Shape <start: int = 1, end: int = 2>(key)
    width_dim = Shape <start: int = 2, end: int = 3>(key)
    count = Constant <value_ints: ints = [1]>()
    two = Constant <value_ints: ints = [2]>()
    six = Constant <value_ints: ints = [6]>()
    eight = Constant <value_ints: ints = [8]>()

    mask_float = Cast <to: int = 1>(row_mask)
    masked_out = Sub(mask_float, one)
    far = Constant <value_float: float = 30000.0>()
    mask_bias = Mul(masked_out, far)
    bias_rows = Sub(mask_bias, row_lse)
    last_axis = Constant <value_ints: ints = [2]>()
    bias = Unsqueeze(bias_rows, last_axis)
    bias_high = CastLike(bias, query)
    bias_high_float = Cast <to: int = 1>(bias_high)
    bias_rest_float = Sub(bias, bias_high_float)
    bias_rest = CastLike(bias_rest_float, query)
    pad_rows_shape = Concat <axis: int = 0>(heads_dim, rows_dim, six)
    pad_rows = Expand(zero_typed, pad_rows_shape)
    real_key = Concat <axis: int = 2>(scaled, bias_high, bias_rest, pad_rows)

    mask_sum = ReduceSum <keepdims: int = 0>(mask_float)
    keys_float = Cast <to: int = 1>(keys_dim)
    expected = Div(mask_sum, keys_float)
    expected_log = Log(expected)
    margin = Constant <value_float: float = 3.0>()
    guess = Sub(expected_log, margin)
    guess_high = CastLike(guess, query)
    guess_used = Cast <to: int = 1>(guess_high)
    extra_zero_shape = Concat <axis: int = 0>(heads_dim, count, width_dim)
    extra_zero = Expand(zero_typed, extra_zero_shape)
    extra_guess_shape = Concat <axis: int = 0>(heads_dim, count, count)
    extra_guess = Expand(guess_high, extra_guess_shape)
    seven = Add(six, count)
    extra_pad_shape = Concat <axis: int = 0>(heads_dim, count, seven)
    extra_pad = Expand(zero_typed, extra_pad_shape)
    extra_key = Concat <axis: int = 2>(extra_zero, extra_guess, extra_pad)
    wide_key = Concat <axis: int = 1>(real_key, extra_key)

    ones_shape = Concat <axis: int = 0>(heads_dim, keys_dim, two)
    ones = Expand(one_typed, ones_shape)
    pad_columns_shape = Concat <axis: int = 0>(heads_dim, keys_dim, six)
    pad_columns = Expand(zero_typed, pad_columns_shape)
    wide_query = Concat <axis: int = 2>(key, ones, pad_columns)

    wide_width = Add(width_dim, eight)
    real_value_shape = Concat <axis: int = 0>(heads_dim, rows_dim, wide_width)
    real_value = Expand(zero_typed, real_value_shape)
    extra_value_shape = Concat <axis: int = 0>(heads_dim, count, wide_width)
    boost = Constant <value_float: float = 32768.0>()
    boost_typed = CastLike(boost, query)
    extra_value = Expand(boost_typed, extra_value_shape)
    wide_value = Concat <axis: int = 1>(real_value, extra_value)

    batch_axis = Constant <value_ints: ints = [0]>()
    query_batch = Unsqueeze(wide_query, batch_axis)
    key_batch = Unsqueeze(wide_key, batch_axis)
    value_batch = Unsqueeze(wide_value, batch_axis)
    mixed = Attention <scale: float = 1.0>(query_batch, key_batch, value_batch)
    first = Constant <value_int: int = 0>()
    share = Gather <axis: int = 3>(mixed, first)
    share_float = Cast <to: int = 1>(share)
    odds = Div(boost, share_float)
    odds_rest = Sub(odds, one)
    guess_sum = Exp(guess_used)
    column_sum = Mul(odds_rest, guess_sum)
    head_sum = Squeeze(column_sum, batch_axis)
    head_mean = ReduceMean <keepdims: int = 0>(head_sum, batch_axis)
    column_mean = Div(head_mean, mask_sum)
}
""")

FUNCTIONS = (ROW_LOG_SUM_EXP, MASKED_COLUMN_MEAN)
