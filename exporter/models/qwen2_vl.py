"""Qwen2-VL (arXiv 2409.12191): a tower with full attention in every block."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from ..shape import TowerShape
from .family import Family, heads_problem, patch_dim

__all__ = ["QWEN2_VL"]


def _tower(vision: Any) -> TowerShape:
    return TowerShape(
        blocks=vision.depth,
        embed_dim=vision.embed_dim,
        heads=vision.num_heads,
        mlp_dim=int(vision.embed_dim * vision.mlp_ratio),
        patch_dim=patch_dim(vision),
        merge_size=vision.spatial_merge_size,
    )


def _problem(config: Qwen2VLConfig) -> str | None:
    vision = config.vision_config
    return heads_problem(vision.embed_dim, vision.num_heads, "embed_dim")


QWEN2_VL = Family(
    name="qwen2_vl",
    title="Qwen2-VL",
    config=Qwen2VLConfig,
    model=Qwen2VLForConditionalGeneration,
    vision_sizes=("depth", "embed_dim", "num_heads"),
    tower=_tower,
    problem=_problem,
)
