"""From a checkpoint to modules: as shapes alone for tracing, or with weights for the PyTorch reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .checkpoint import Checkpoint, CheckpointError, TensorReader
from .models import LanguageGraph, VisionGraph, family_of
from .schedule import Schedule
from .shape import ModelShape

__all__ = ["check_weights", "load_model", "pruned_graphs", "shapes_only"]


@contextmanager
def shapes_only(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[Any]:
    """The model without data, inside the mode in which it can be traced."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield family_of(checkpoint.config).model._from_config(checkpoint.config, dtype=dtype)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The Hugging Face model with its weights, streamed into place.

    Raises:
        CheckpointError: a missing weight or one of another shape.
    """
    with torch.device("meta"):
        model = family_of(checkpoint.config).model._from_config(checkpoint.config, dtype=dtype)
    model.to_empty(device="cpu")
    with TensorReader(checkpoint) as reader, torch.no_grad():
        check_weights(checkpoint, model)
        for source, parameter in _stored_parameters(checkpoint, model):
            parameter.copy_(reader.read(source))
    model.tie_weights()
    _fill_rotary_tables(model)
    return model.eval()


def check_weights(checkpoint: Checkpoint, model: Any) -> None:
    """Compare the checkpoint's tensors with what its configuration asks for, before anything long is done with them.

    Raises:
        CheckpointError: a missing weight or one of another shape.
    """
    for source, parameter in _stored_parameters(checkpoint, model):
        info, shape = checkpoint.tensors.get(source), tuple(parameter.shape)
        if info is None:
            raise CheckpointError(f"{checkpoint.path}: the weights lack {source}; the checkpoint is incomplete or of another architecture")
        if info.shape != shape:
            raise CheckpointError(f"{info.file}: {source} is {list(info.shape)}, config.json asks for {list(shape)}")


def _stored_parameters(checkpoint: Checkpoint, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters with their canonical names; a tied head is stored once, as the embedding table."""
    for name, parameter in model.named_parameters():
        source = name.removeprefix("model.")
        if source != "lm_head.weight" or not checkpoint.config.tie_word_embeddings:
            yield source, parameter


def pruned_graphs(
    model: Any, shape: ModelShape, schedule: Schedule, vision: type[VisionGraph] = VisionGraph, language: type[LanguageGraph] = LanguageGraph
) -> tuple[VisionGraph, LanguageGraph]:
    """The two walked graphs over a model's modules; ``vision`` and ``language`` may be those of another method."""
    tied = model.config.tie_word_embeddings
    return vision(model.model.visual, shape, schedule), language(model.model.language_model, None if tied else model.lm_head, shape, schedule)


def _fill_rotary_tables(model: Any) -> None:
    """Recompute the buffers that checkpoints do not hold (``to_empty`` left them undefined)."""
    text = model.model.language_model.rotary_emb
    inverse, _ = text.compute_default_rope_parameters(text.config)
    text.inv_freq.copy_(inverse)
    text.original_inv_freq.copy_(inverse)
    vision = model.model.visual.rotary_pos_emb
    vision.inv_freq.copy_(1.0 / (vision.theta ** (torch.arange(0, vision.dim, 2, dtype=torch.float) / vision.dim)))
