"""The pruned model in PyTorch: the walked graphs run eagerly, with the same preparation and the same caches as an engine, and no exported graph.

``TorchBackend`` is a backend of ``Session``: what ``verify`` compares engines with. ``ReferenceModel`` goes step by step through questions with any
graphs: what tuning and the comparison of methods evaluate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engines.backends.base import EmbeddedImage
from ..engines.directory import kv_segments
from ..engines.manifest import Segment, TokenIds
from ..engines.positions import ImageSurvivors, prompt_positions, text_positions
from ..engines.preprocess import load_image, preprocess_image
from ..engines.prompt import PromptEncoder, expand_image_tokens
from ..engines.request import ImageSource, prompt_lengths
from .build import copy_text_files, image_processor
from .checkpoint import Checkpoint
from .model import load_model, pruned_graphs
from .models import Embedded, LanguageGraph, VisionGraph, model_shape
from .schedule import Schedule

__all__ = ["Picture", "Question", "ReferenceModel", "Reply", "TorchBackend", "cosine", "overlap"]

NUMPY_DTYPES: dict[torch.dtype, type[np.floating[Any]]] = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


class TorchBackend:
    """The walked graphs, run eagerly.

    Args:
        vision, language: from ``pruned_graphs``, for one schedule; segments: its KV capacities.
    """

    def __init__(self, vision: VisionGraph, language: LanguageGraph, segments: tuple[Segment, ...]) -> None:
        self._vision, self._language = vision, language
        self._dtype: torch.dtype = next(language.parameters()).dtype
        self.dtype = NUMPY_DTYPES[self._dtype]
        self.slots = 1
        self._caches, self._biases = [], []
        for segment in segments:
            if language.schedule.proportional_attention:
                self._biases.append(torch.zeros(1, 1, segment.capacity, 1, dtype=self._dtype))
            for _ in range(segment.layers):
                sizes = (1, language.shape.kv_heads, segment.capacity, language.shape.head_dim)
                self._caches.append((torch.zeros(sizes, dtype=self._dtype), torch.zeros(sizes, dtype=self._dtype)))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV caches."""
        return sum(cache.nbytes for cache in self._buffers())

    def clear_caches(self, slot: int | None = None) -> None:
        """Overwrite the caches with zeros."""
        for cache in self._buffers():
            cache.zero_()

    def _buffers(self) -> Iterator[Tensor]:
        yield from self._biases
        for pair in self._caches:
            yield from pair

    @torch.inference_mode()
    def vision(self, pixel_values: NDArray[np.floating[Any]], entropy: NDArray[np.float32], budget: int) -> EmbeddedImage:
        """As ``OnnxRuntimeBackend.vision``."""
        measured = torch.from_numpy(entropy) if entropy.size else None
        outputs = self._vision(torch.from_numpy(pixel_values).to(self._dtype), measured, torch.zeros(budget, dtype=torch.int32))
        return EmbeddedImage(*(output.numpy() for output in outputs if output is not None))

    @torch.inference_mode()
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
        """As ``OnnxRuntimeBackend.language``, for one request."""
        logits, last_hidden, self._caches, self._biases = self._language(
            torch.from_numpy(input_ids),
            torch.from_numpy(position_ids),
            torch.from_numpy(visual_embeds).to(self._dtype),
            torch.from_numpy(visual_positions),
            torch.from_numpy(importance),
            torch.zeros(budget, dtype=torch.int32),
            torch.from_numpy(key_bias) if self._biases else None,
            torch.from_numpy(past_lengths),
            self._caches,
            self._biases,
        )
        return logits.numpy(), last_hidden.numpy()


@dataclass(frozen=True)
class Picture:
    """One image up to the tower: ``pixel_values`` T [rows, columns, G, patch_dim], ``entropy`` float32 [rows, columns, G], grid in visual tokens."""

    pixel_values: Tensor
    entropy: Tensor

    @property
    def rows(self) -> int:
        return self.pixel_values.shape[0]

    @property
    def columns(self) -> int:
        return self.pixel_values.shape[1]

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Question:
    """A prompt, tokenised with one placeholder an image, and its pictures."""

    token_ids: list[int]
    pictures: tuple[Picture, ...]

    @property
    def visual_tokens(self) -> int:
        """Original visual tokens of all pictures."""
        return sum(picture.tokens for picture in self.pictures)

    @property
    def text_tokens(self) -> int:
        """Prompt tokens that are not visual."""
        return len(self.token_ids) - len(self.pictures)


@dataclass(frozen=True)
class Reply:
    """What a prefill and greedy decoding gave.

    Attributes:
        last_hidden: float32 [H], of the last prompt token after the final norm; logits: float32 [vocab_size], its own; token_ids: generated.
    """

    last_hidden: NDArray[np.float32]
    logits: NDArray[np.float32]
    token_ids: tuple[int, ...]


class ReferenceModel:
    """A checkpoint in PyTorch that answers questions, with any schedule and any graphs over the same weights."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
        self.shape = model_shape(checkpoint.config)
        self.model = load_model(checkpoint, dtype)
        self.processor = image_processor(checkpoint)
        self._dtype = dtype
        with tempfile.TemporaryDirectory() as folder:
            ids = copy_text_files(checkpoint, Path(folder))
            self.tokens = TokenIds(ids["image"], ids["vision_start"], ids["vision_end"], tuple(ids["stop"]))
            self.encoder = PromptEncoder(Path(folder) / "tokenizer.json", Path(folder) / "chat_template.jinja", self.tokens)

    def read(self, images: Sequence[ImageSource], prompt: str, *, image_share: float = 1.0) -> Question:
        """Preprocess; ``image_share`` < 1 resizes each image to at most that share of the visual tokens it would have."""
        return Question(self.encoder.encode(prompt, len(images)), tuple(self._picture(image, image_share) for image in images))

    def _picture(self, source: ImageSource, image_share: float) -> Picture:
        tower, image = self.shape.tower, load_image(source)
        patches = preprocess_image(image, self.processor)
        if image_share < 1:
            factor = self.processor.factor
            allowed = int(image_share * (patches.grid_thw[1] * patches.grid_thw[2] // tower.group) + 1e-9)
            limit = max(1, allowed) * factor * factor
            patches = preprocess_image(image, replace(self.processor, min_pixels=1, max_pixels=limit))
        grid = (patches.grid_thw[1] // tower.merge_size, patches.grid_thw[2] // tower.merge_size, tower.group)
        pixel_values = torch.from_numpy(patches.pixel_values).to(self._dtype).reshape(*grid, tower.patch_dim)
        return Picture(pixel_values, torch.from_numpy(patches.entropy).reshape(grid))

    def graphs(
        self, schedule: Schedule, vision: type[VisionGraph] = VisionGraph, language: type[LanguageGraph] = LanguageGraph
    ) -> tuple[VisionGraph, LanguageGraph]:
        """The walked graphs of a schedule, or of a method that chooses in another way."""
        return pruned_graphs(self.model, self.shape, schedule, vision, language)

    @torch.inference_mode()
    def reply(self, language: LanguageGraph, vision: VisionGraph, question: Question, embedded: Sequence[Embedded], *, new_tokens: int) -> Reply:
        """Prefill with pictures that are embedded already, then choose at most ``new_tokens`` tokens greedily (0: only the hidden state)."""
        schedule, decoder, image_token = language.schedule, self.shape.decoder, self.tokens.image
        survivors = [
            ImageSurvivors(picture.rows, picture.columns, image.index.numpy()) for picture, image in zip(question.pictures, embedded, strict=True)
        ]
        input_ids, places = expand_image_tokens(question.token_ids, [image.index.size for image in survivors], image_token=image_token)
        position_ids, position = prompt_positions(input_ids, survivors, image_token=image_token, renumber_first_stage=schedule.renumber_first_stage)
        room = question.text_tokens + new_tokens
        segments = kv_segments(schedule, decoder.layers, max_visual_tokens=max(1, question.visual_tokens), max_text_tokens=room)
        backend = TorchBackend(vision, language, segments)
        visual_embeds = torch.cat([image.visual_embeds for image in embedded]) if embedded else torch.zeros(0, self.shape.visual_width)
        none = torch.zeros(0)
        logits, last_hidden = backend.language(
            input_ids=input_ids[None],
            position_ids=position_ids[:, None],
            visual_embeds=visual_embeds.numpy(),
            visual_positions=places,
            importance=torch.cat([none, *(image.importance for image in embedded)]).numpy(),
            key_bias=torch.cat([none, *(image.key_bias for image in embedded if image.key_bias is not None)]).numpy(),
            budget=question.visual_tokens,
            past_lengths=np.zeros((1, len(segments)), np.int64),
        )
        sizes = {"text_tokens": question.text_tokens, "visual_tokens": places.size, "budget": question.visual_tokens}
        lengths = prompt_lengths(segments, **sizes)[None]
        prompt_logits = logits[0]
        tokens: list[int] = []
        while len(tokens) < new_tokens:
            tokens.append(int(logits.argmax()))
            if tokens[-1] in self.tokens.stop or len(tokens) == new_tokens:
                break
            logits, _ = backend.language(
                input_ids=np.array([[tokens[-1]]], np.int64),
                position_ids=text_positions(position, 1)[:, None],
                visual_embeds=np.zeros((0, self.shape.visual_width), backend.dtype),
                visual_positions=np.zeros(0, np.int64),
                importance=none.numpy(),
                key_bias=none.numpy(),
                budget=0,
                past_lengths=lengths,
            )
            lengths, position = lengths + 1, position + 1
        return Reply(last_hidden[0].astype(np.float32), prompt_logits, tuple(tokens))


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """cos(a, b), each [H]."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def overlap(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Probability that two next-token distributions share, Σ min(p, q) = 1 − total variation distance, from their logits, each [vocab_size]."""
    return float(np.minimum(_softmax(a), _softmax(b)).sum())


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    shares: NDArray[np.float64] = exponentials / exponentials.sum()
    return shares
