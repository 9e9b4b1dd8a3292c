"""The pruned model in PyTorch, as a backend of ``Session``: same preparation, same caches, no exported graph.

What ``verify`` compares engines with, and what tuning evaluates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..engines.manifest import Segment
from .model import pruned_graphs
from .schedule import Schedule
from .shape import ModelShape

__all__ = ["TorchBackend"]

NUMPY_DTYPES: dict[torch.dtype, type[np.floating[Any]]] = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


class TorchBackend:
    """The walked graphs, run eagerly.

    Args:
        model: from ``load_model``; shape, schedule: what the engine was built with; segments: its KV capacities.
    """

    def __init__(self, model: Any, shape: ModelShape, schedule: Schedule, segments: tuple[Segment, ...]) -> None:
        self._vision, self._language = pruned_graphs(model, shape, schedule)
        self._dtype: torch.dtype = model.dtype
        self.dtype = NUMPY_DTYPES[self._dtype]
        self._caches = []
        for segment in segments:
            for _ in range(segment.layers):
                sizes = (1, shape.decoder.kv_heads, segment.capacity, shape.decoder.head_dim)
                self._caches.append((torch.zeros(sizes, dtype=self._dtype), torch.zeros(sizes, dtype=self._dtype)))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV caches."""
        return sum(key.nbytes + value.nbytes for key, value in self._caches)

    def clear_caches(self) -> None:
        """Overwrite the caches with zeros."""
        for key, value in self._caches:
            key.zero_()
            value.zero_()

    @torch.inference_mode()
    def vision(
        self, pixel_values: NDArray[np.float32], entropy: NDArray[np.float32], budget: int
    ) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.int64]]:
        """As ``OnnxRuntimeBackend.vision``."""
        embeds, importance, index = self._vision(
            torch.from_numpy(pixel_values).to(self._dtype), torch.from_numpy(entropy), torch.zeros(budget, dtype=torch.int32)
        )
        return embeds.numpy(), importance.numpy(), index.numpy()

    @torch.inference_mode()
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
        """As ``OnnxRuntimeBackend.language``."""
        logits, last_hidden, self._caches = self._language(
            torch.from_numpy(input_ids),
            torch.from_numpy(position_ids),
            torch.from_numpy(visual_embeds).to(self._dtype),
            torch.from_numpy(visual_positions),
            torch.from_numpy(importance),
            torch.zeros(budget, dtype=torch.int32),
            torch.from_numpy(past_lengths),
            self._caches,
        )
        return logits[0].numpy(), last_hidden[0].numpy()
