"""The decoder (Qwen2 or Qwen3 with three-axis rotary positions) over KV caches of fixed capacity, with its stages."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...plugins.compaction import gather_tokens, keep_top
from ...plugins.guidance import last_token_attention
from ..schedule import Schedule, keep_count
from ..shape import ModelShape
from ..standard_ops import cached_causal_attention, masked_attention, rms_norm, rotary_embedding, tensor_scatter
from .vision import PROTECTED

__all__ = ["LanguageGraph"]

TEXT_KEY = float("inf")  # ranking key of a token that is not visual


class LanguageGraph(nn.Module):
    """The decoder with its stages, over KV caches of fixed capacity: prefill of one request and decoding of a batch."""

    def __init__(self, language_model: Any, lm_head: nn.Linear | None, shape: ModelShape, schedule: Schedule) -> None:
        """``lm_head`` is None where the head is tied to the embedding table."""
        super().__init__()
        self.language_model = language_model
        self.lm_head, self.shape, self.schedule = lm_head, shape.decoder, schedule
        self.stages = {stage.layer: stage for stage in schedule.later_stages}
        rope = self.language_model.config.rope_parameters
        self.theta, self.sections = float(rope["rope_theta"]), list(rope["mrope_section"])
        self.interleaved = hasattr(self.language_model.rotary_emb, "apply_interleaved_mrope")
        self.deepstack_layers = len(shape.tower.deepstack_blocks)
        self.epsilon = float(self.language_model.config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        visual_embeds: Tensor,
        visual_positions: Tensor,
        importance: Tensor | None,
        budget_tokens: Tensor | None,
        key_bias: Tensor | None,
        past_lengths: Tensor,
        past_key_values: list[tuple[Tensor, Tensor]],
        past_key_bias: list[Tensor],
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]], list[Tensor]]:
        """Extend the caches by S tokens.

        Args:
            input_ids: int64 [B, S]; position_ids: int64 [3, B, S].
            visual_embeds: T [V, H], or with DeepStack T [V, (1 + D) · H], behind each embedding what the first D layers add; visual_positions:
                int64 [V], their columns; V > 0 only with B = 1.
            importance: float32 [V], budget_tokens: [N] (length only); None without stages inside the decoder.
            key_bias: float32 [V]; None without proportional attention.
            past_lengths: int64 [B, segments]; past_key_values: per layer key and value [B, KV, capacity, head_dim].
            past_key_bias: per segment T [B, 1, capacity, 1], what is added to scores of the tokens in its caches; empty without.

        Returns:
            logits float32 [B, vocab] and hidden states after the final norm [B, H], both of the last token, and the caches.
        """
        length = input_ids.shape[1]
        embeds = F.embedding(input_ids, self.language_model.embed_tokens.weight)
        batch, _, width = embeds.shape
        hidden = _put_rows(embeds, visual_positions, visual_embeds[:, :width] if self.deepstack_layers else visual_embeds)
        deepstack: Tensor | None = None  # T [B, S, D · H], zeros at text
        if self.deepstack_layers:
            deepstack = _put_rows(embeds.new_zeros(batch, length, self.deepstack_layers * width), visual_positions, visual_embeds[:, width:])
        cos, sin = self._rotary(position_ids, hidden)
        ranking = self._ranking_key(length, visual_positions, importance) if importance is not None else None
        bias = _put_rows(torch.zeros_like(hidden[..., :1]), visual_positions, key_bias[:, None]) if key_bias is not None else None  # [B, S, 1]
        alive, segment, mask = visual_embeds.shape[0], 0, None
        query_key: tuple[Tensor, Tensor] | None = None
        present: list[tuple[Tensor, Tensor]] = []
        present_bias: list[Tensor] = []
        for number, layer in enumerate(self.language_model.layers):
            stage = self.stages.get(number)
            if stage is not None and ranking is not None and budget_tokens is not None and query_key is not None:
                survivors = keep_count(budget_tokens.shape[0], stage.keep)
                score = self.rank(number, hidden, ranking, *query_key)
                index = keep_top(score, hidden.shape[1] - (alive - survivors))
                hidden, cos, sin, ranking = gather_tokens(hidden, cos, sin, ranking, index)
                bias = bias[:, index] if bias is not None else None
                deepstack = deepstack[:, index] if deepstack is not None and number < self.deepstack_layers else None
                alive, segment = survivors, segment + 1
            if bias is not None and (number == 0 or stage is not None):
                present_bias.append(_extend_bias(past_key_bias[segment], bias, past_lengths[:, segment]))
                mask = _causal_mask(present_bias[-1], past_lengths[:, segment], bias.shape[1])
            hidden, query_key, cache = self._layer(layer, hidden, cos, sin, past_lengths[:, segment], past_key_values[number], mask)
            present.append(cache)
            if deepstack is not None and number < self.deepstack_layers:
                hidden = hidden + deepstack[..., number * width : (number + 1) * width]
        last = rms_norm(hidden[:, -1], self.language_model.norm.weight, epsilon=self.epsilon)  # [B, H]
        # The head's weight is the embedding table in tied models: multiplied from the left, both graphs' users share one tensor.
        head = self.language_model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        logits = (head @ last.T).T.float()
        return logits, last, present, present_bias

    def _layer(
        self, layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, past_length: Tensor, past: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """One decoder layer: hidden states, its queries and keys of these tokens, and its cache. ``mask`` None is plain causal attention."""
        attn, sizes = layer.self_attn, self.shape
        normed = rms_norm(hidden, layer.input_layernorm.weight, epsilon=self.epsilon)
        batch, length, _ = hidden.shape
        query = self._head_norm(attn, "q_norm", attn.q_proj(normed).reshape(batch, length, sizes.heads, sizes.head_dim)).transpose(1, 2)
        key = self._head_norm(attn, "k_norm", attn.k_proj(normed).reshape(batch, length, sizes.kv_heads, sizes.head_dim)).transpose(1, 2)
        value = attn.v_proj(normed).reshape(batch, length, sizes.kv_heads, sizes.head_dim).transpose(1, 2)
        query, key = rotary_embedding(query, cos, sin), rotary_embedding(key, cos, sin)
        cache = tensor_scatter(past[0], key, past_length), tensor_scatter(past[1], value, past_length)
        scale = sizes.head_dim**-0.5
        if mask is None:
            mixed = cached_causal_attention(query, *cache, past_length + length, scale=scale)
        else:
            mixed = masked_attention(query, *cache, mask, scale=scale)
        hidden = hidden + attn.o_proj(mixed.transpose(1, 2).reshape(batch, length, sizes.heads * sizes.head_dim))
        hidden = hidden + layer.mlp(rms_norm(hidden, layer.post_attention_layernorm.weight, epsilon=self.epsilon))
        return hidden, (query, key), cache

    def _head_norm(self, attn: Any, name: str, heads: Tensor) -> Tensor:
        """Queries or keys [B, S, heads, head_dim], normed head by head where the layer has a norm for them (Qwen3)."""
        return rms_norm(heads, getattr(attn, name).weight, epsilon=self.epsilon) if hasattr(attn, name) else heads

    def _ranking_key(self, length: int, visual_positions: Tensor, importance: Tensor) -> Tensor:
        """float32 [S]: importance at the visual columns, +inf at text."""
        text = torch.full((1, length, 1), TEXT_KEY, dtype=torch.float32, device=importance.device)
        return _put_rows(text, visual_positions, importance[:, None]).reshape(length)

    def rank(self, layer: int, hidden: Tensor, ranking: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """What the stage before ``layer`` ranks by: float32 [S], +inf at text; (1 − β) s + β g, g the attention of the last token.

        Protected tokens stay far above all others, at β = 1 too.

        Args:
            hidden: T [1, S, H]; ranking: float32 [S], the importance carried (s); query, key: [1, heads, S, head_dim] of the layer just computed.
        """
        weight = self.schedule.guidance_weight
        if weight == 0:
            return ranking
        guide = last_token_attention(query[0, :, -1], key[0], ranking < TEXT_KEY, scale=self.shape.head_dim**-0.5)
        return (1 - weight) * ranking + weight * guide if weight < 1 else torch.where(ranking < PROTECTED, guide, ranking)

    def _rotary(self, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, S, head_dim/2]; each frequency turns with the axis that its M-RoPE section names.

        Interleaved, the axes take turns, height and width as often as their sections are long, and what is left is time's.
        """
        half = self.shape.head_dim // 2
        number = torch.arange(half, device=like.device)
        temporal, height, width = self.sections
        if self.interleaved:
            turn = number % 3
            axis = ((turn == 1) & (number < 3 * height)).long() + 2 * ((turn == 2) & (number < 3 * width)).long()
        else:
            axis = (number >= temporal).long() + (number >= temporal + height).long()
        steps = number.float() / half
        angles = position_ids[axis].permute(1, 2, 0).float() * self.theta**-steps  # [B, S, head_dim/2]
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _extend_bias(past: Tensor, added: Tensor, past_length: Tensor) -> Tensor:
    """T [B, 1, capacity, 1] with ``added`` [B, S, 1] from entry ``past_length`` [B] on.

    No TensorScatter, as keys and values have: TensorRT for RTX 1.7 crashes when it builds a second one of these beside theirs. What comes out may lie
    where ``past`` lies: written twice, it is the same.
    """
    place = torch.arange(past.shape[2], device=past.device) - past_length[:, None]  # [B, capacity]
    length = added.shape[1]
    new = added[..., 0].gather(1, place.clamp(min=0).clamp(max=length - 1))
    return torch.where((place >= 0) & (place < length), new, past[:, 0, :, 0])[:, None, :, None]


def _causal_mask(bias: Tensor, past_length: Tensor, length: int) -> Tensor:
    """What is added to attention scores of the last ``length`` tokens: T [B, 1, length, capacity], −∞ at what comes after a token.

    bias: T [B, 1, capacity, 1]; past_length: int64 [B], tokens before these. Engines take a mask or their own causality, not both.
    """
    entry = torch.arange(bias.shape[2], device=bias.device)
    last_seen = past_length[:, None] + torch.arange(length, device=bias.device)  # [B, length]
    return torch.where(entry <= last_seen[:, None, :, None], bias.transpose(2, 3), float("-inf"))


def _put_rows(rows: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Replace rows of a batch of one: [B, S, C] with values [V, C] at columns [V]; V = 0 leaves any batch as it is."""
    batch, length, width = rows.shape
    flat = rows.reshape(batch * length, width)
    return flat.index_put((positions,), values.to(rows.dtype)).reshape(batch, length, width)
