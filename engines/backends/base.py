"""What a session asks of whatever computes its two graphs."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Backend", "EmbeddedImage", "VisionBackend"]


class EmbeddedImage(NamedTuple):
    """What the vision graph makes of one image: ``visual_embeds`` T [M, hidden_size], ``importance`` float32 [M], ``index`` int64 [M], and where the
    graph has it ``key_bias`` float32 [M]."""

    visual_embeds: NDArray[Any]
    importance: NDArray[np.float32]
    index: NDArray[np.int64]  # type: ignore[assignment]  # the graph's name for it, more use here than tuple.index
    key_bias: NDArray[np.float32] | None = None


class VisionBackend(Protocol):
    """The vision graph; shapes and dtypes in docs/architecture.md."""

    @property
    def dtype(self) -> type[np.floating[Any]]:
        """T, the type of the embeddings."""

    def vision(self, pixel_values: NDArray[np.floating[Any]], entropy: NDArray[np.float32], budget: int) -> EmbeddedImage:
        """One image."""


class Backend(VisionBackend, Protocol):
    """Two graphs and the KV caches between their calls; shapes and dtypes in docs/architecture.md.

    The caches have ``slots`` rows, each for one request. ``vision`` may run in another thread than the rest.
    """

    slots: int

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV caches of all slots, read off the buffers themselves."""

    def clear_caches(self, slot: int | None = None) -> None:
        """Overwrite the caches of one slot, or of all, with finite numbers."""

    def language(
        self,
        *,
        input_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        visual_embeds: NDArray[Any],
        visual_positions: NDArray[np.int64],
        importance: NDArray[np.float32],
        key_bias: NDArray[np.float32],
        budget: int,
        past_lengths: NDArray[np.int64],
        slot: int = 0,
    ) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Append S tokens to the caches of B slots from ``slot`` on: ``logits`` float32 [B, vocab_size] and ``last_hidden`` T [B, hidden_size] of the
        last ones."""
