"""Qwen3-VL (arXiv 2511.21631): learned positions in the tower, DeepStack between tower and decoder, normed queries and keys in the decoder."""

from __future__ import annotations

import math
from typing import Any

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from .family import Family

__all__ = ["QWEN3_VL"]


def _tower(vision: Any) -> dict[str, Any]:
    return {"mlp_dim": vision.intermediate_size, "deepstack_blocks": tuple(vision.deepstack_visual_indexes)}


def _problem(config: Qwen3VLConfig) -> str | None:
    vision, text = config.vision_config, config.text_config
    blocks = list(vision.deepstack_visual_indexes)
    if not all(type(block) is int and 0 <= block < vision.depth for block in blocks) or blocks != sorted(set(blocks)):
        return f"vision_config.deepstack_visual_indexes must be blocks of the tower, 0..{vision.depth - 1}, ascending"
    if len(blocks) > text.num_hidden_layers:
        return "vision_config.deepstack_visual_indexes must be no more than text_config.num_hidden_layers"
    if math.isqrt(vision.num_position_embeddings) ** 2 != vision.num_position_embeddings:
        return "vision_config.num_position_embeddings must be a square"
    if vision.out_hidden_size != text.hidden_size:
        return "vision_config.out_hidden_size must be text_config.hidden_size"
    return None


QWEN3_VL = Family(
    name="qwen3_vl",
    title="Qwen3-VL",
    config=Qwen3VLConfig,
    model=Qwen3VLForConditionalGeneration,
    width="hidden_size",
    tower=_tower,
    sizes=("intermediate_size", "num_position_embeddings"),
    own_head_dim=True,
    interleaved=True,
    problem=_problem,
)
