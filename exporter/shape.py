"""The sizes of a model, as far as schedules, budgets and runtimes need them. No weights, no framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["DecoderShape", "ModelShape", "TowerShape"]


@dataclass(frozen=True)
class TowerShape:
    """Vision tower: full attention over patches, then a merger of ``merge_size``² patches to one visual token."""

    blocks: int
    embed_dim: int
    heads: int
    mlp_dim: int
    patch_dim: int  # values of one flattened patch
    merge_size: int

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.heads

    @property
    def group(self) -> int:
        """Patches of one visual token."""
        return self.merge_size**2


@dataclass(frozen=True)
class DecoderShape:
    """Language model with grouped-query attention and a gated MLP."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int


@dataclass(frozen=True)
class ModelShape:
    """Tower and decoder."""

    tower: TowerShape
    decoder: DecoderShape

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelShape:
        return cls(TowerShape(**values["tower"]), DecoderShape(**values["decoder"]))
