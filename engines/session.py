"""Generation: images and a prompt in, text out, over the stages of the engine's schedule.

The lower steps are public, since ``verify`` compares them one by one with the model: :meth:`Session.prepare` (pixels, tokens, vision
graph), :meth:`Session.prefill`, :meth:`Session.decode` and :meth:`Session.extend` (language graph).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..exporter.schedule import keep_count
from .backends.base import Backend
from .backends.load import load_backend
from .errors import EngineError
from .manifest import Engine
from .positions import ImageSurvivors, prompt_positions, text_positions
from .preprocess import ImagePatches, load_image, preprocess_image
from .prompt import Prompt, PromptEncoder, expand_image_tokens
from .results import GenerationResult, Prepared, Step, kv_bytes, stage_counts
from .sampling import SamplingParams, next_token
from .text_stream import TextStream

__all__ = ["ImageSource", "Session"]

DEFAULT_MAX_NEW_TOKENS = 256  # where the request does not say; fewer if the engine has no room

ImageSource = str | Path | Image.Image | NDArray[np.uint8]


class Session:
    """An engine that is loaded and answers one request at a time (no two threads at once).

    Args:
        engine: from :func:`vflow.engines.open_engine`.
        target: ``onnxruntime``, or ``tensorrt-rtx`` or ``tensorrt`` where the directory was built for it.
        provider: of ONNX Runtime: ``cpu`` or ``cuda``; None takes CUDA where it is.
        threads: of ONNX Runtime on the CPU; None leaves it to the runtime.
        backend: what computes the two graphs, instead of what ``target`` names.

    Raises:
        EngineError: the engine cannot be loaded on this machine.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        target: str = "onnxruntime",
        provider: str | None = None,
        threads: int | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.engine = engine
        self.encoder = PromptEncoder(engine.tokenizer_path, engine.chat_template_path, engine.tokens)
        self.backend = backend or load_backend(engine, target, provider=provider, threads=threads)
        self._lengths: NDArray[np.int64] | None = None  # [segments], tokens in the caches; None before the first prefill
        self._next_position = 0
        self._request = 0  # so that an abandoned stream does not write into the caches of the next request

    def generate(
        self,
        prompt: Prompt,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        keep_scale: float = 1.0,
        max_pixels: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> GenerationResult:
        """Answer a request; ``on_text`` is called with each piece of text as it appears. Arguments and errors as :meth:`stream`."""
        stream = self.stream(prompt, images, max_new_tokens=max_new_tokens, sampling=sampling, keep_scale=keep_scale, max_pixels=max_pixels)
        while True:
            try:
                text = next(stream)
            except StopIteration as end:
                result: GenerationResult = end.value
                return result
            if on_text is not None:
                on_text(text)

    def stream(
        self,
        prompt: Prompt,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        keep_scale: float = 1.0,
        max_pixels: int | None = None,
    ) -> Generator[str, None, GenerationResult]:
        """Answer a request piece by piece; the generator's return value is the whole result.

        Args:
            prompt: messages, or the text of one user message.
            images: files, Pillow images or uint8 [height, width, 3] arrays, in the order of their placeholders.
            max_new_tokens: refused if the engine has no room for them; None takes ``DEFAULT_MAX_NEW_TOKENS`` or what fits.
            sampling: None is greedy.
            keep_scale: in (0, 1], share of the built budget that this request spends.
            max_pixels: images are scaled down to this many pixels; None takes the checkpoint's limit.

        Raises:
            EngineError: a request that the engine cannot take; the message says what to change.
        """
        began = time.perf_counter()
        sampling = sampling or SamplingParams()
        generator = np.random.default_rng(sampling.seed)
        if max_new_tokens is not None and max_new_tokens < 1:
            raise EngineError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        prepared = self.prepare(prompt, images, keep_scale=keep_scale, max_pixels=max_pixels)
        self._check_room(prepared, max_new_tokens or 1)
        before_prefill = time.perf_counter()
        step = self.prefill(prepared)
        request = self._request
        prefill_seconds = time.perf_counter() - before_prefill
        limit = max_new_tokens or min(DEFAULT_MAX_NEW_TOKENS, self.room + 1)  # the last token of an answer never enters the caches

        text_stream = TextStream(self.encoder.decode)
        pieces: list[str] = []
        token_ids = [self._choose(step, sampling, generator)]
        first_token = time.perf_counter()
        while token_ids[-1] not in self.engine.tokens.stop:
            if piece := text_stream.push(token_ids[-1]):
                pieces.append(piece)
                yield piece
            if len(token_ids) == limit:
                break
            if request != self._request:
                raise EngineError("another request was started on this session before this stream was read to its end; use one session for each")
            token_ids.append(self._choose(self.decode(token_ids[-1]), sampling, generator))
        decode_seconds = time.perf_counter() - first_token
        if piece := text_stream.finish():
            pieces.append(piece)
            yield piece
        return GenerationResult(
            text="".join(pieces),
            token_ids=tuple(token_ids),
            finish_reason="stop" if token_ids[-1] in self.engine.tokens.stop else "length",
            prompt_tokens=prepared.input_ids.size,
            visual_tokens=prepared.visual_tokens,
            stages=stage_counts(self.engine, prepared.budgets),
            kv_bytes=kv_bytes(self.engine, self.backend.cache_bytes),
            vision_s=prepared.vision_seconds,
            prefill_s=prefill_seconds,
            ttft_s=first_token - began,
            tokens_per_s=(len(token_ids) - 1) / decode_seconds if len(token_ids) > 1 else None,
        )

    def prepare(self, prompt: Prompt, images: Sequence[ImageSource] = (), *, keep_scale: float = 1.0, max_pixels: int | None = None) -> Prepared:
        """Encode the prompt, run the vision graph on each image, and lay out tokens and positions. The caches stay as they are.

        Raises:
            EngineError: see :meth:`stream`.
        """
        if not 0 < keep_scale <= 1:
            raise EngineError(f"keep_scale must be in (0, 1], got {keep_scale}")
        token_ids = self.encoder.encode(prompt, len(images))
        began = time.perf_counter()
        patches = [self._preprocess(image, max_pixels) for image in images]
        grids = [self._visual_grid(patch) for patch in patches]
        self._check_visual_tokens([rows * columns for rows, columns in grids])
        budgets = tuple(math.ceil(rows * columns * keep_scale) for rows, columns in grids)

        decoder = self.engine.shape.decoder
        embeds, importances, survivors = [np.zeros((0, decoder.hidden_size), self.backend.dtype)], [np.zeros(0, np.float32)], []
        for patch, (rows, columns), budget in zip(patches, grids, budgets, strict=True):
            visual_embeds, importance, index = self._run_vision(patch, rows, columns, budget)
            embeds.append(visual_embeds)
            importances.append(importance)
            survivors.append(ImageSurvivors(rows, columns, index))
        vision_seconds = time.perf_counter() - began

        image_token = self.engine.tokens.image
        input_ids, visual_positions = expand_image_tokens(token_ids, [image.index.size for image in survivors], image_token=image_token)
        position_ids, next_position = prompt_positions(
            input_ids, survivors, image_token=image_token, renumber_first_stage=self.engine.schedule.renumber_first_stage
        )
        return Prepared(
            input_ids=input_ids,
            position_ids=position_ids,
            next_position=next_position,
            visual_embeds=np.concatenate(embeds),
            importance=np.concatenate(importances),
            visual_positions=visual_positions,
            survivors=tuple(survivors),
            visual_tokens=sum(rows * columns for rows, columns in grids),
            budgets=budgets,
            vision_seconds=vision_seconds,
        )

    def prefill(self, prepared: Prepared) -> Step:
        """Start a new request: the caches hold this prompt afterwards, whatever they held before.

        Raises:
            EngineError: the prompt is longer than the engine was built for.
        """
        self._check_room(prepared, 1)
        self._request += 1
        self._lengths = None
        step = self._run_language(prepared, np.zeros(len(self.engine.segments), np.int64))
        self._lengths = self._prompt_lengths(prepared)
        self._next_position = prepared.next_position
        return step

    def decode(self, token: int) -> Step:
        """Append one token to the caches."""
        return self.extend([token])

    def extend(self, tokens: Sequence[int]) -> Step:
        """Append tokens to the caches as text, all at once (an image token that the model itself has written is text as well).

        Raises:
            EngineError: no request has been started, or no room.
        """
        if self._lengths is None:
            raise EngineError("no request has been started; call prefill first")
        input_ids = np.asarray(tokens, np.int64)
        if input_ids.ndim != 1 or not input_ids.size:
            raise EngineError("extend takes a list of at least one token")
        if input_ids.size > self.room:
            raise EngineError(
                f"the KV caches have room for {self.room} more tokens, not {input_ids.size}; shorten, or build with a larger --max-text-tokens"
            )
        chunk = Prepared(
            input_ids=input_ids,
            position_ids=text_positions(self._next_position, input_ids.size),
            next_position=self._next_position + input_ids.size,
            visual_embeds=np.zeros((0, self.engine.shape.decoder.hidden_size), self.backend.dtype),
            importance=np.zeros(0, np.float32),
            visual_positions=np.zeros(0, np.int64),
            survivors=(),
            visual_tokens=0,
            budgets=(),
            vision_seconds=0.0,
        )
        step = self._run_language(chunk, self._lengths)
        self._lengths = self._lengths + input_ids.size
        self._next_position = chunk.next_position
        return step

    @property
    def room(self) -> int:
        """Text tokens for which every segment's caches still have room."""
        if self._lengths is None:
            return min(segment.capacity for segment in self.engine.segments)
        return self._room(self._lengths)

    def _room(self, lengths: NDArray[np.int64]) -> int:
        return min(segment.capacity - int(length) for segment, length in zip(self.engine.segments, lengths, strict=True))

    def _prompt_lengths(self, prepared: Prepared) -> NDArray[np.int64]:
        """Tokens of a prompt in each segment: int64 [segments]."""
        visual = prepared.visual_positions.size
        text = prepared.input_ids.size - visual
        later = [keep_count(prepared.budget, segment.keep) for segment in self.engine.segments[1:]]
        return np.array([visual, *later], np.int64) + text

    def _check_room(self, prepared: Prepared, new_tokens: int) -> None:
        """Refuse a prompt that does not fit, or an answer that would not: its last token needs no room."""
        room = self._room(self._prompt_lengths(prepared))
        built = self.engine.limits.max_text_tokens
        if room < 0:
            text = prepared.input_ids.size - prepared.visual_positions.size
            raise EngineError(
                f"prompt has {text} text tokens, the engine was built for {built}; shorten it, or build with a larger --max-text-tokens"
            )
        if new_tokens > room + 1:
            raise EngineError(
                f"max_new_tokens {new_tokens} is more than the {room + 1} for which there is room after this prompt "
                f"(max_text_tokens {built} built); ask for fewer, or build with a larger --max-text-tokens"
            )

    def _preprocess(self, source: ImageSource, max_pixels: int | None) -> ImagePatches:
        config = self.engine.image_processor
        if max_pixels is not None:
            if max_pixels < config.min_pixels:
                raise EngineError(f"max_pixels must be at least {config.min_pixels} (the checkpoint's min_pixels), got {max_pixels}")
            config = replace(config, max_pixels=max_pixels)
        return preprocess_image(load_image(source), config)

    def _visual_grid(self, patches: ImagePatches) -> tuple[int, int]:
        """Rows and columns of an image in visual tokens."""
        merge_size = self.engine.shape.tower.merge_size
        return patches.grid_thw[1] // merge_size, patches.grid_thw[2] // merge_size

    def _check_visual_tokens(self, counts: Sequence[int]) -> None:
        built = self.engine.limits.max_visual_tokens
        if sum(counts) > built:
            what = f"image has {counts[0]}" if len(counts) == 1 else f"images have {sum(counts)} together"
            raise EngineError(f"max_visual_tokens {built} built, {what}; resize (max_pixels), or rebuild with --max-visual-tokens")

    def _run_vision(self, patches: ImagePatches, rows: int, columns: int, budget: int) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.int64]]:
        tower = self.engine.shape.tower
        pixel_values = patches.pixel_values.reshape(rows, columns, tower.group, tower.patch_dim)
        entropy = patches.entropy.reshape(rows, columns, tower.group)
        return self.backend.vision(pixel_values, entropy, budget)

    def _run_language(self, prepared: Prepared, past_lengths: NDArray[np.int64]) -> Step:
        logits, last_hidden = self.backend.language(
            input_ids=prepared.input_ids[None],  # [1, S]
            position_ids=prepared.position_ids[:, None],  # [3, 1, S]
            visual_embeds=prepared.visual_embeds,
            visual_positions=prepared.visual_positions,
            importance=prepared.importance,
            budget=prepared.budget,
            past_lengths=past_lengths[None],  # [1, segments]
        )
        return Step(logits, last_hidden)

    def _choose(self, step: Step, sampling: SamplingParams, generator: np.random.Generator) -> int:
        try:
            return next_token(step.logits, sampling, generator)
        except EngineError:
            self._lengths = None
            self.backend.clear_caches()  # what overflowed must not reach the next request
            raise
