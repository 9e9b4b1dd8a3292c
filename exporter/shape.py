"""The sizes of a model, as far as schedules, budgets and runtimes need them. No weights, no framework."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["DecoderShape", "ModelShape", "TowerShape"]


@dataclass(frozen=True)
class TowerShape:
    """Vision tower: attention over patches, then a merger of ``merge_size``² patches to one visual token.

    Attributes:
        window: side of the square windows, in visual tokens, beyond which a patch does not look; 0: every block looks at the whole image.
        full_blocks: with windows, the blocks that look at the whole image all the same, ascending.
        deepstack_blocks: blocks behind which the tokens are merged as well, by mergers of their own; what these give is added to the visual
            tokens behind the first layers of the decoder, one block a layer (DeepStack, arXiv 2406.04334). Ascending.
    """

    blocks: int
    embed_dim: int
    heads: int
    mlp_dim: int
    patch_dim: int  # values of one flattened patch
    merge_size: int
    mlp_matrices: int = 2  # of embed_dim × mlp_dim in a block; a gated MLP has three
    window: int = 0
    full_blocks: tuple[int, ...] = ()
    deepstack_blocks: tuple[int, ...] = ()

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.heads

    @property
    def group(self) -> int:
        """Patches of one visual token."""
        return self.merge_size**2

    @property
    def merged_blocks(self) -> tuple[int, ...]:
        """Blocks behind each of which a merger stands: DeepStack's, and the last."""
        return (*self.deepstack_blocks, self.blocks - 1)

    def looks_everywhere(self, block: int) -> bool:
        """Whether a block's attention goes over the whole image: only such attention ranks tokens."""
        return not self.window or block in self.full_blocks

    def ranking_block(self, block: int) -> int | None:
        """The block whose attention ranks the tokens as they leave ``block``: the last up to it that looks everywhere; None before the first."""
        return max(filter(self.looks_everywhere, range(block + 1)), default=None)

    def windows(self, length: int) -> int:
        """Windows along an axis of ``length`` visual tokens; the image's edge may cut the last. Works on symbolic sizes as well."""
        return (length + self.window - 1) // self.window  # nothing negative: ONNX rounds towards zero


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

    @property
    def visual_width(self) -> int:
        """Values of one visual token as the decoder gets it: its embedding, and what DeepStack adds to it."""
        return self.decoder.hidden_size * (1 + len(self.tower.deepstack_blocks))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
