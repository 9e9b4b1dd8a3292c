"""The standard ONNX operators that engines fuse, callable: computed in PyTorch, one node of opset 24 when traced.

``Attention``, ``RMSNormalization``, ``RotaryEmbedding`` and ``TensorScatter`` as the ONNX specification defines them
(onnx.ai/onnx/operators). PyTorch's own operators would be exported decomposed, and engines would not recognise them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plugins.node import OPSET, is_tracing

__all__ = ["attention", "cached_causal_attention", "masked_attention", "rms_norm", "rotary_embedding", "tensor_scatter"]


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Full attention. query [B, H, R, D]; key, value [B, KV, P, D]; returns [B, H, R, D]."""
    if is_tracing():
        return _standard("Attention", (query, key, value), {"scale": scale}, query)
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


def cached_causal_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, scale: float) -> Tensor:
    """Attention to a cache of fixed capacity, causal from the bottom right: query r of R sees the first lengths − R + r + 1 entries.

    Args:
        query: [B, H, R, D]; keys, values: [B, KV, capacity, D]; lengths: int64 [B], entries in use, R newest included.

    Returns:
        [B, H, R, D].
    """
    if is_tracing():
        inputs = (query, keys, values, None, None, None, lengths)
        return _standard("Attention", inputs, {"scale": scale, "is_causal": 1}, query)
    rows, capacity = query.shape[2], keys.shape[2]
    last_seen = (lengths[:, None] - rows + torch.arange(rows, device=lengths.device))[:, None, :, None]  # [B, 1, R, 1]
    visible = torch.arange(capacity, device=lengths.device) <= last_seen
    return F.scaled_dot_product_attention(query, keys, values, visible, scale=scale, enable_gqa=query.shape[1] != keys.shape[1])


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *, scale: float) -> Tensor:
    """Attention with a mask that is added to the scores.

    Args:
        query: [B, H, R, D]; keys, values: [B, KV, P, D]; mask: [B, 1, R, P], −∞ where a query does not look.

    Returns:
        [B, H, R, D].
    """
    if is_tracing():
        return _standard("Attention", (query, keys, values, mask), {"scale": scale}, query)
    return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=query.shape[1] != keys.shape[1])


def tensor_scatter(cache: Tensor, update: Tensor, starts: Tensor) -> Tensor:
    """Cache with ``update`` written from entry ``starts`` of each row on; the engine does it in place.

    Args:
        cache: [B, KV, capacity, D]; update: [B, KV, S, D]; starts: int64 [B].
    """
    if is_tracing():
        return _standard("TensorScatter", (cache, update, starts), {"axis": 2, "mode": "linear"}, cache)
    entries = starts[:, None] + torch.arange(update.shape[2], device=starts.device)  # [B, S]
    rows = torch.arange(cache.shape[0], device=starts.device)[:, None]
    written = cache.clone()
    written[rows, :, entries] = update.transpose(1, 2)
    return written


def rms_norm(hidden: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last axis, in float32 (float64 for float64)."""
    if is_tracing():
        return _standard("RMSNormalization", (hidden, weight), {"axis": -1, "epsilon": epsilon, "stash_type": 1}, hidden)
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(hidden.dtype)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head. x [B, H, S, D]; cos, sin [B, S, D/2]."""
    if is_tracing():
        return _standard("RotaryEmbedding", (x, cos, sin), {"interleaved": 0}, x)
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _standard(op: str, inputs: Sequence[Tensor | None], attributes: dict[str, Any], like: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(op, inputs, attributes, dtype=like.dtype, shape=like.shape, version=OPSET)
