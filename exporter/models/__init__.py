"""The models that are pruned: Hugging Face's modules, walked with pruning between them.

``VisionGraph`` and ``LanguageGraph`` are both the PyTorch reference of the pruned model and what is traced for export. They call the
checkpoint's own modules (projections, MLPs, layer norms) and put attention, caches and stages between them. Methods that choose tokens in
another way (``exporter/methods``) override ``rank_pixels``, ``score``, ``compact`` and ``rank``. What families differ in is a
:class:`~.family.Family`, one file each. Symbols: N visual tokens of an image, G = merge_size² patches a token, P = N · G patches, C the
tower's width, H the language model's.
"""

from __future__ import annotations

from ..shape import ModelShape
from .family import Family, ModelConfig, image_token_ids
from .language import LanguageGraph
from .qwen2_5_vl import QWEN2_5_VL
from .qwen2_vl import QWEN2_VL
from .qwen3_vl import QWEN3_VL
from .vision import PROTECTED, Compacted, Embedded, TowerState, VisionGraph, pixel_importance

__all__ = [
    "FAMILIES", "PROTECTED", "QWEN2_5_VL", "QWEN2_VL", "QWEN3_VL", "Compacted", "Embedded", "Family", "LanguageGraph", "ModelConfig", "TowerState",
    "VisionGraph", "family_of", "image_token_ids", "model_shape", "pixel_importance",
]  # fmt: skip

FAMILIES = {family.name: family for family in (QWEN2_VL, QWEN2_5_VL, QWEN3_VL)}


def family_of(config: ModelConfig) -> Family:
    """The family of a checkpoint's configuration."""
    return FAMILIES[config.model_type]


def model_shape(config: ModelConfig) -> ModelShape:
    """The sizes that schedules, budgets and runtimes need."""
    return family_of(config).shape(config)
