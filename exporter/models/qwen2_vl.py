"""Qwen2-VL (arXiv 2409.12191): a tower with full attention in every block."""

from __future__ import annotations

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from .family import Family

__all__ = ["QWEN2_VL"]

QWEN2_VL = Family(
    name="qwen2_vl",
    title="Qwen2-VL",
    config=Qwen2VLConfig,
    model=Qwen2VLForConditionalGeneration,
    width="embed_dim",
    tower=lambda vision: {"mlp_dim": int(vision.embed_dim * vision.mlp_ratio)},
)
