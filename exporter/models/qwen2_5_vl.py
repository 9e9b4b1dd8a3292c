"""Qwen2.5-VL (arXiv 2502.13923): RMS norms and gated MLPs in the tower, whose blocks look at windows but for a few that look at the whole image."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .family import Family

__all__ = ["QWEN2_5_VL"]


def _tower(vision: Any) -> dict[str, Any]:
    return {
        "mlp_dim": vision.intermediate_size,
        "mlp_matrices": 3,
        "window": vision.window_size // (vision.patch_size * vision.spatial_merge_size),
        "full_blocks": tuple(sorted(set(vision.fullatt_block_indexes))),
    }


def _problem(config: Qwen2_5_VLConfig) -> str | None:
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    if vision.window_size < side:
        return f"vision_config.window_size must be at least {side} pixels, one visual token"
    if not all(type(block) is int and 0 <= block < vision.depth for block in vision.fullatt_block_indexes):
        return f"vision_config.fullatt_block_indexes must be blocks of the tower, 0..{vision.depth - 1}"
    if vision.out_hidden_size != config.text_config.hidden_size:
        return "vision_config.out_hidden_size must be text_config.hidden_size"
    return None


QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    title="Qwen2.5-VL",
    config=Qwen2_5_VLConfig,
    model=Qwen2_5_VLForConditionalGeneration,
    width="hidden_size",
    tower=_tower,
    sizes=("intermediate_size", "window_size"),
    problem=_problem,
)
