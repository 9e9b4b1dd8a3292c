"""Qwen2-VL (arXiv 2409.12191): the Hugging Face modules, walked with pruning between them.

``VisionGraph`` and ``LanguageGraph`` are both the PyTorch reference of the pruned model and what is traced for export. They call the
checkpoint's own modules (norms, projections, MLPs) and put attention, caches and stages between them. Methods that choose tokens in
another way (``exporter/methods``) override ``rank_pixels``, ``score``, ``compact`` and ``rank``. Symbols: N visual tokens of an
image, G = merge_size² patches a token, P = N · G patches, C the tower's width, H the language model's.
"""

from __future__ import annotations

from transformers import Qwen2VLConfig

from ...shape import DecoderShape, ModelShape, TowerShape
from .language import LanguageGraph
from .vision import Compacted, Embedded, TowerState, VisionGraph, pixel_importance

__all__ = [
    "FAMILY", "Compacted", "Embedded", "LanguageGraph", "TowerState", "VisionGraph", "image_token_ids", "model_shape", "pixel_importance",
]  # fmt: skip

FAMILY = "qwen2_vl"


def model_shape(config: Qwen2VLConfig) -> ModelShape:
    """The sizes that schedules, budgets and runtimes need."""
    vision, text = config.vision_config, config.text_config
    tower = TowerShape(
        blocks=vision.depth,
        embed_dim=vision.embed_dim,
        heads=vision.num_heads,
        mlp_dim=int(vision.embed_dim * vision.mlp_ratio),
        patch_dim=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        merge_size=vision.spatial_merge_size,
    )
    decoder = DecoderShape(
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.hidden_size // text.num_attention_heads,
        mlp_dim=text.intermediate_size,
        vocab_size=text.vocab_size,
    )
    return ModelShape(tower, decoder)


def image_token_ids(config: Qwen2VLConfig) -> dict[str, int]:
    """Special tokens around an image."""
    return {"image": config.image_token_id, "vision_start": config.vision_start_token_id, "vision_end": config.vision_end_token_id}
