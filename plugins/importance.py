"""Importance scoring: how much attention each patch receives, without the patch × patch map (docs/algorithm.md, section 1).

With A = softmax(Q Kᵀ · scale) of one tower block, row i looking at column j:

    RowLogSumExp        λ_hk = log Σ_j exp(scale · q_hk · k_hj)                                     [H, R]
    MaskedColumnMean    c_hj = Σ_k m_k exp(scale · q_hk · k_hj − λ_hk)  /  Σ_k m_k                  [H, P]

The second is averaged over the heads, and used twice: with every row (received attention, over R), then with the rows of the global tokens (context
relevance). VFlowOpt (arXiv 2508.05211), section 3.2.

Both lower to fused attention, which every engine has in O(P) memory: a log-sum-exp Z can be read off an attention's output when one more key
of known score g is told apart by its value. With the values (1, 0) for the real keys and (0, 1) for the extra one the output is
(e^Z, e^g) / (e^Z + e^g), and their ratio gives Z without cancellation, however small or large. The column sums are again a log-sum-exp,
of attention with Q and K swapped and a bias per key; a bias is one more dimension in which all queries hold 1. Biases are split into two
dimensions (value and rounding rest), so that half precision does not round them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compaction import keep_top
from .node import emit, function_body, is_tracing
from .torch_ops import register

__all__ = [
    "FUNCTIONS",
    "add_entropy",
    "context_relevance",
    "global_tokens",
    "masked_column_mean",
    "received_attention",
    "row_log_sum_exp",
    "share_count",
]

ROW_CHUNK = 256  # rows of the map that the reference holds at once
ALL_ROWS = 1024  # shares of rows are integers of this


def row_log_sum_exp(query: Tensor, key: Tensor, *, scale: float, segment: Tensor | None = None) -> Tensor:
    """Log of the softmax denominator of each attention row.

    Args:
        query: [H, R, D]; key: [H, P, D]; any float dtype, accumulated in float32.
        segment: int32 [P] where several images or frames are scored together (then R = P): no attention between segments. An exported
            graph scores one image a call and takes none.

    Returns:
        float32 [H, R].
    """
    if is_tracing():
        _refuse(segment)
        return emit("RowLogSumExp", (query, key), {"scale": scale}, [(torch.float32, query.shape[:2])])[0]
    _check_square(query, key, segment)
    row_lse: Tensor = _row_log_sum_exp(query, key, segment, scale)
    return row_lse


def masked_column_mean(query: Tensor, key: Tensor, row_lse: Tensor, row_mask: Tensor, *, scale: float, segment: Tensor | None = None) -> Tensor:
    """Mean of the attention map's columns over the masked rows and all heads.

    Args:
        query: [H, R, D]; key: [H, P, D]; row_lse: float32 [H, R] from ``row_log_sum_exp``; row_mask: bool [R], not all false.
        segment: as in ``row_log_sum_exp``.

    Returns:
        float32 [P]; sums to 1 over all columns.
    """
    if is_tracing():
        _refuse(segment)
        output = (torch.float32, key.shape[:2])
        return emit("MaskedColumnMean", (query, key, row_lse, row_mask), {"scale": scale}, [output])[0].mean(0)
    _check_square(query, key, segment)
    column_mean: Tensor = _masked_column_mean(query, key, row_lse, row_mask, segment, scale)
    return column_mean.mean(0)


def _refuse(segment: Tensor | None) -> None:
    if segment is not None:
        raise ValueError("an exported graph scores one image a call: segments are for PyTorch only")


def _check_square(query: Tensor, key: Tensor, segment: Tensor | None) -> None:
    if segment is not None and not query.shape[1] == key.shape[1] == segment.shape[0]:
        raise ValueError(f"segment names patches, so rows ({query.shape[1]}), patches ({key.shape[1]}) and it ({segment.shape[0]}) must match")


def _reference_row_log_sum_exp(query: Tensor, key: Tensor, segment: Tensor | None, scale: float) -> Tensor:
    starts = range(0, query.shape[1], ROW_CHUNK)
    chunks = [torch.logsumexp(_scores(query, key, segment, start, scale), -1) for start in starts]
    return torch.cat(chunks, 1)


def _reference_masked_column_mean(query: Tensor, key: Tensor, row_lse: Tensor, row_mask: Tensor, segment: Tensor | None, scale: float) -> Tensor:
    heads, patches = key.shape[:2]
    total = torch.zeros(heads, patches, dtype=torch.float32, device=key.device)
    for start in range(0, query.shape[1], ROW_CHUNK):
        rows = slice(start, start + ROW_CHUNK)
        attention = torch.exp(_scores(query, key, segment, start, scale) - row_lse[:, rows, None])  # [H, chunk, P]
        total += (attention * row_mask[rows].float()[:, None]).sum(1)
    return total / row_mask.sum()


def _scores(query: Tensor, key: Tensor, segment: Tensor | None, start: int, scale: float) -> Tensor:
    """Scores of ROW_CHUNK rows from ``start``, −inf between segments: [H, chunk, P]."""
    rows = slice(start, start + ROW_CHUNK)
    scores = query[:, rows].float() @ key.float().transpose(1, 2) * scale
    return scores if segment is None else scores.masked_fill(segment[rows, None] != segment, float("-inf"))


_row_log_sum_exp = register(
    "row_log_sum_exp(Tensor query, Tensor key, Tensor? segment, float scale) -> Tensor",
    _reference_row_log_sum_exp,
    lambda query, key, segment, scale: query.new_empty(query.shape[:2], dtype=torch.float32),
    "importance_kernels:ROW_LOG_SUM_EXP",
)
_masked_column_mean = register(
    "masked_column_mean(Tensor query, Tensor key, Tensor row_lse, Tensor row_mask, Tensor? segment, float scale) -> Tensor",
    _reference_masked_column_mean,
    lambda query, key, row_lse, row_mask, segment, scale: key.new_empty(key.shape[:2], dtype=torch.float32),
    "importance_kernels:MASKED_COLUMN_MEAN",
)


def received_attention(query: Tensor, key: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Attention that each patch receives, from all query rows or a sample of them.

    Args:
        query: [H, R, D]; key: [H, P, D].

    Returns:
        The rows' log-sum-exp float32 [H, R], and received attention float32 [P], 1 on average.
    """
    row_lse = row_log_sum_exp(query, key, scale=scale)
    everyone = torch.ones_like(row_lse[0], dtype=torch.bool)
    return row_lse, masked_column_mean(query, key, row_lse, everyone, scale=scale) * key.shape[1]


def global_tokens(received: Tensor, global_threshold: float) -> Tensor:
    """Which tokens are global: bool [P]. Those above the threshold, and always the most attended ones, so that there is one.

    (The research code averages over nothing where none is above, and NaN ranks first.)
    """
    return (received > global_threshold) | (received >= received.amax(0))


def context_relevance(
    query: Tensor, key: Tensor, *, scale: float, global_threshold: float, score_rows: int = ALL_ROWS, global_rows: int = ALL_ROWS
) -> Tensor:
    """Mean attention that each patch receives from the global tokens (paper, section 3.2).

    Args:
        query, key: [H, P, D] after rotary embedding.
        global_threshold: t, in average attentions; 0 makes all tokens global, and the result received attention.
        score_rows: share of the query rows, in 1/1024 and evenly spaced, from which received attention is estimated (beyond the
            paper; 1024 is exact).
        global_rows: room for the global tokens, in 1/1024 of the patches. Received attention averages 1, so fewer than P/t exceed t,
            and no more rows than that need to be computed.

    Returns:
        float32 [P], sums to 1.
    """
    patches = key.shape[1]
    sampled = query
    if score_rows < ALL_ROWS:
        rows = share_count(patches, score_rows)
        sampled = query[:, torch.arange(rows, device=query.device) * ALL_ROWS // score_rows]
    row_lse, received = received_attention(sampled, key, scale=scale)
    if global_threshold == 0:
        return received / patches
    is_global = global_tokens(received, global_threshold)
    if score_rows == ALL_ROWS and global_rows == ALL_ROWS:  # nothing to choose: the mask does it, without a copy of the queries
        return masked_column_mean(query, key, row_lse, is_global, scale=scale)
    index = keep_top(received, share_count(patches, global_rows))
    chosen = query[:, index]
    chosen_lse = row_lse[:, index] if score_rows == ALL_ROWS else row_log_sum_exp(chosen, key, scale=scale)
    return masked_column_mean(chosen, key, chosen_lse, is_global[index], scale=scale)


def share_count(count: int, share: int) -> int:
    """⌈count · share / 1024⌉; symbolic sizes as well."""
    return (count * share + ALL_ROWS - 1) // ALL_ROWS


def add_entropy(relevance: Tensor, entropy: Tensor, *, entropy_weight: float) -> Tensor:
    """s = c + α · softmax(e) (paper, equation 4). Both float32 [P]."""
    if entropy_weight == 0:
        return relevance
    return relevance + entropy_weight * torch.softmax(entropy[None], 1)[0]  # two axes, which TensorRT asks for


# The score g of the extra key is E[s] under the row's own attention, read off one more fused attention whose values are the keys. Z = E[s] +
# entropy, so g lies within log P below Z whatever the scores: nothing cancels, overflows or vanishes, in half precision either.
# Values are 32768, not 1: half precision then holds shares over 20 e-foldings.
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

    seven = Constant <value_ints: ints = [7]>()
    value_pad_width = Add(width_dim, six)
    real_pad_width = Add(width_dim, seven)
    boost = Constant <value_float: float = 32768.0>()
    boost_typed = CastLike(boost, query)
    real_mark_shape = Concat <axis: int = 0>(heads_dim, keys_dim, count)
    real_mark = Expand(boost_typed, real_mark_shape)
    real_pad_shape = Concat <axis: int = 0>(heads_dim, keys_dim, real_pad_width)
    real_pad = Expand(zero_typed, real_pad_shape)
    real_value = Concat <axis: int = 2>(real_mark, real_pad)
    mark_shape = Concat <axis: int = 0>(heads_dim, count, count)
    extra_blank = Expand(zero_typed, mark_shape)
    extra_mark = Expand(boost_typed, mark_shape)
    value_pad_shape = Concat <axis: int = 0>(heads_dim, count, value_pad_width)
    value_pad = Expand(zero_typed, value_pad_shape)
    extra_value = Concat <axis: int = 2>(extra_blank, extra_mark, value_pad)
    wide_value = Concat <axis: int = 1>(real_value, extra_value)

    query_batch = Unsqueeze(wide_query, batch_axis)
    key_batch = Unsqueeze(wide_key, batch_axis)
    value_batch = Unsqueeze(wide_value, batch_axis)
    mixed = Attention <scale: float = 1.0>(query_batch, key_batch, value_batch)
    first = Constant <value_int: int = 0>()
    second = Constant <value_int: int = 1>()
    real_share_typed = Gather <axis: int = 3>(mixed, first)
    extra_share_typed = Gather <axis: int = 3>(mixed, second)
    real_share = Cast <to: int = 1>(real_share_typed)
    extra_share = Cast <to: int = 1>(extra_share_typed)
    odds = Div(real_share, extra_share)
    odds_log = Log(odds)
    odds_rows = Squeeze(odds_log, batch_axis)
    guess_rows = Squeeze(guess_used, last_axis)
    row_lse = Add(guess_rows, odds_rows)
}
""")

# The extra key's score is log(mean column sum) − 3, so its share of a typical column is neither lost nor all there is.
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
    seven = Constant <value_ints: ints = [7]>()
    extra_pad_shape = Concat <axis: int = 0>(heads_dim, count, seven)
    extra_pad = Expand(zero_typed, extra_pad_shape)
    extra_key = Concat <axis: int = 2>(extra_zero, extra_guess, extra_pad)
    wide_key = Concat <axis: int = 1>(real_key, extra_key)

    ones_shape = Concat <axis: int = 0>(heads_dim, keys_dim, two)
    ones = Expand(one_typed, ones_shape)
    pad_columns_shape = Concat <axis: int = 0>(heads_dim, keys_dim, six)
    pad_columns = Expand(zero_typed, pad_columns_shape)
    wide_query = Concat <axis: int = 2>(key, ones, pad_columns)

    value_pad_width = Add(width_dim, six)
    real_pad_width = Add(width_dim, seven)
    boost = Constant <value_float: float = 32768.0>()
    boost_typed = CastLike(boost, query)
    real_mark_shape = Concat <axis: int = 0>(heads_dim, rows_dim, count)
    real_mark = Expand(boost_typed, real_mark_shape)
    real_pad_shape = Concat <axis: int = 0>(heads_dim, rows_dim, real_pad_width)
    real_pad = Expand(zero_typed, real_pad_shape)
    real_value = Concat <axis: int = 2>(real_mark, real_pad)
    mark_shape = Concat <axis: int = 0>(heads_dim, count, count)
    extra_blank = Expand(zero_typed, mark_shape)
    extra_mark = Expand(boost_typed, mark_shape)
    value_pad_shape = Concat <axis: int = 0>(heads_dim, count, value_pad_width)
    value_pad = Expand(zero_typed, value_pad_shape)
    extra_value = Concat <axis: int = 2>(extra_blank, extra_mark, value_pad)
    wide_value = Concat <axis: int = 1>(real_value, extra_value)

    batch_axis = Constant <value_ints: ints = [0]>()
    query_batch = Unsqueeze(wide_query, batch_axis)
    key_batch = Unsqueeze(wide_key, batch_axis)
    value_batch = Unsqueeze(wide_value, batch_axis)
    mixed = Attention <scale: float = 1.0>(query_batch, key_batch, value_batch)
    first = Constant <value_int: int = 0>()
    second = Constant <value_int: int = 1>()
    real_share_typed = Gather <axis: int = 3>(mixed, first)
    extra_share_typed = Gather <axis: int = 3>(mixed, second)
    real_share = Cast <to: int = 1>(real_share_typed)
    extra_share = Cast <to: int = 1>(extra_share_typed)
    odds = Div(real_share, extra_share)
    guess_sum = Exp(guess_used)
    column_sum = Mul(odds, guess_sum)
    head_sum = Squeeze(column_sum, batch_axis)
    column_mean = Div(head_sum, mask_sum)
}
""")

FUNCTIONS = (ROW_LOG_SUM_EXP, MASKED_COLUMN_MEAN)
