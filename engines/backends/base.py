"""What a session asks of whatever computes its two graphs."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Backend"]


class Backend(Protocol):
    """Two graphs and the KV caches between their calls; shapes and dtypes in docs/architecture.md."""

    dtype: type[np.floating[Any]]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV caches, read off the buffers themselves."""

    def clear_caches(self) -> None:
        """Overwrite the caches with finite numbers."""

    def vision(
        self, pixel_values: NDArray[np.float32], entropy: NDArray[np.float32], budget: int
    ) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.int64]]:
        """One image: ``visual_embeds`` T [M, hidden_size], ``importance`` float32 [M], ``index`` int64 [M]."""

    def language(
        self,
        *,
        input_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        visual_embeds: NDArray[Any],
        visual_positions: NDArray[np.int64],
        importance: NDArray[np.float32],
        budget: int,
        past_lengths: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Append S tokens to the caches: ``logits`` float32 [vocab_size] and ``last_hidden`` T [hidden_size] of the last one."""
