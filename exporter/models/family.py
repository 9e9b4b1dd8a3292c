"""What model families differ in, as far as the walked graphs do not see it from the modules and the shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig
from transformers.activations import ACT2FN

from ..shape import DecoderShape, ModelShape, TowerShape

__all__ = ["Family", "ModelConfig", "image_token_ids"]

ModelConfig: TypeAlias = Qwen2VLConfig | Qwen2_5_VLConfig | Qwen3VLConfig
TEXT_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
TOWER_SIZES = ("depth", "num_heads", "in_channels", "patch_size", "temporal_patch_size", "spatial_merge_size")


@dataclass(frozen=True)
class Family:
    """A model family with a decoder of Qwen2's or Qwen3's layers and three-axis rotary positions.

    Attributes:
        name: ``model_type`` in config.json.
        title: as its authors write it.
        config, model: Hugging Face's classes.
        width: field of the vision configuration that holds the tower's width.
        tower: of a vision configuration, what of the tower's shape is the family's own.
        sizes: fields of the vision configuration that must be at least 1 beside those of every family.
        own_head_dim: whether the text configuration has ``head_dim``; else heads divide the hidden size.
        interleaved: whether the rotary positions' axes take turns along the frequencies, and not a section each.
        problem: what else is wrong with the tower of a configuration whose sizes are whole numbers.
    """

    name: str
    title: str
    config: type[Any]
    model: type[Any]
    width: str
    tower: Callable[[Any], Mapping[str, Any]]
    sizes: tuple[str, ...] = ()
    own_head_dim: bool = False
    interleaved: bool = False
    problem: Callable[[Any], str | None] = lambda config: None

    def shape(self, config: ModelConfig) -> ModelShape:
        """Tower and decoder of a configuration that has been checked."""
        vision, text = config.vision_config, config.text_config
        tower = TowerShape(
            blocks=vision.depth,
            embed_dim=getattr(vision, self.width),
            heads=vision.num_heads,
            patch_dim=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            merge_size=vision.spatial_merge_size,
            **self.tower(vision),
        )
        decoder = DecoderShape(
            layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=self._head_dim(text),
            mlp_dim=text.intermediate_size,
            vocab_size=text.vocab_size,
        )
        return ModelShape(tower, decoder)

    def check(self, config: ModelConfig) -> str | None:
        """What the graphs would compute wrongly or fail at, of what transformers lets pass; the field to change is named."""
        if getattr(config.text_config, "use_sliding_window", False):
            return "use_sliding_window is not supported; set it to false if the model was trained without it"
        return self._wrong_size(config) or self._wrong_positions(config.text_config) or _wrong_value(config) or self.problem(config)

    def _wrong_size(self, config: ModelConfig) -> str | None:
        own = ("head_dim",) if self.own_head_dim else ()
        for part, names in (("text_config", (*TEXT_SIZES, *own)), ("vision_config", (self.width, *self.sizes, *TOWER_SIZES))):
            for name in names:
                size = getattr(config, part).__dict__[name]
                if type(size) is not int or size < 1:
                    return f"{part}.{name} must be at least 1"
        text, vision = config.text_config, config.vision_config
        whole_groups = text.num_attention_heads % text.num_key_value_heads == 0
        if self.own_head_dim and (text.head_dim % 2 or not whole_groups):
            return "text_config.head_dim must be even, and num_attention_heads a multiple of num_key_value_heads"
        if not self.own_head_dim and (text.hidden_size % (2 * text.num_attention_heads) or not whole_groups):
            return "text_config.num_attention_heads must divide hidden_size into heads of even width, and be a multiple of num_key_value_heads"
        if getattr(vision, self.width) % (4 * vision.num_heads):  # the two-dimensional rotary embedding turns quarters
            return f"vision_config.num_heads must divide {self.width} into heads whose width is a multiple of 4"
        return None

    def _wrong_positions(self, text: Any) -> str | None:
        rope, where = text.rope_parameters or {}, "text_config.rope_parameters"
        if rope.get("rope_type", "default") != "default":
            return f"rope_type {rope['rope_type']!r} is not supported (supported: default)"
        if not _is_number(rope.get("rope_theta")) or rope["rope_theta"] <= 0:
            return f"{where}.rope_theta must be a positive number"
        if rope.get("mrope_interleaved", self.interleaved) != self.interleaved:
            return f"{where}.mrope_interleaved must be {str(self.interleaved).lower()}, as {self.title} is computed"
        sections = rope.get("mrope_section")
        if (
            not isinstance(sections, list)
            or len(sections) != 3
            or not all(type(size) is int and size >= 0 for size in sections)
            or 2 * sum(sections) != self._head_dim(text)
        ):
            return f"{where}.mrope_section must be three whole numbers that sum to half of the width of a head"
        return None

    def _head_dim(self, text: Any) -> int:
        head_dim: int = text.head_dim if self.own_head_dim else text.hidden_size // text.num_attention_heads
        return head_dim


def _wrong_value(config: ModelConfig) -> str | None:
    text = config.text_config
    for part in ("text_config", "vision_config"):
        activation = getattr(getattr(config, part), "hidden_act", None)
        if activation is not None and activation not in ACT2FN:
            return f"{part}.hidden_act {activation!r} is unknown to transformers"
    if not _is_number(text.rms_norm_eps) or text.rms_norm_eps < 0:
        return "text_config.rms_norm_eps must be a number of at least 0"
    for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
        if not 0 <= getattr(config, name) < text.vocab_size:
            return f"{name} must be a token, 0..{text.vocab_size - 1}"
    return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def image_token_ids(config: ModelConfig) -> dict[str, int]:
    """Special tokens around an image."""
    return {"image": config.image_token_id, "vision_start": config.vision_start_token_id, "vision_end": config.vision_end_token_id}
