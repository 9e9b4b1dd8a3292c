"""Generation: images and a prompt in, text out, over the stages of the engine's schedule.

The lower steps are public, since ``verify`` compares them one by one with the model: :meth:`Session.prepare` (pixels, tokens, vision
graph), :meth:`Session.prefill`, :meth:`Session.decode` and :meth:`Session.extend` (language graph).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence

import numpy as np
from numpy.typing import NDArray

from .answer import Answer
from .backends.base import Backend
from .backends.load import load_backend
from .errors import EngineError
from .manifest import Engine
from .positions import text_positions
from .prompt import Prompt, PromptEncoder
from .request import ImageSource, answer_room, prepare_request, prompt_lengths, read_request, run_language
from .results import GenerationResult, Prepared, Step, kv_bytes
from .sampling import SamplingParams

__all__ = ["ImageSource", "Session"]


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
        self._spoiled = False  # whether the caches may hold what is not finite
        self._request = 0  # so that an abandoned stream does not write into the caches of the next request

    def generate(
        self,
        prompt: Prompt,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        keep_scale: float = 1.0,
        max_pixels: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> GenerationResult:
        """Answer a request; ``on_text`` is called with each piece of text as it appears. Arguments and errors as :meth:`stream`."""
        stream = self.stream(
            prompt, images, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, keep_scale=keep_scale, max_pixels=max_pixels
        )
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
        stop: Sequence[str] = (),
        keep_scale: float = 1.0,
        max_pixels: int | None = None,
    ) -> Generator[str, None, GenerationResult]:
        """Answer a request piece by piece; the generator's return value is the whole result.

        Args:
            prompt: messages, or the text of one user message.
            images: files, their contents as bytes, Pillow images or uint8 [height, width, 3] arrays, in the order of their placeholders.
            max_new_tokens: refused if the engine has no room for them; None takes ``DEFAULT_MAX_NEW_TOKENS`` or what fits.
            sampling: None is greedy.
            stop: texts before the first of which the answer ends.
            keep_scale: in (0, 1], share of the built budget that this request spends.
            max_pixels: images are scaled down to this many pixels; None takes the checkpoint's limit.

        Raises:
            EngineError: a request that the engine cannot take; the message says what to change.
        """
        began = time.perf_counter()
        request = read_request(
            self.engine,
            self.encoder,
            prompt,
            images,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            keep_scale=keep_scale,
            max_pixels=max_pixels,
            dtype=self.backend.dtype,
        )
        prepared = prepare_request(self.engine, self.backend, request)
        answer = Answer(self.engine, self.encoder.decode, request, prepared, began=began)
        logits = self.prefill(prepared).logits
        number = self._request
        while True:
            if piece := self._push(answer, logits):
                yield piece
            if answer.finished:
                return answer.result(kv_bytes(self.engine, self.backend.cache_bytes // self.backend.slots))
            if number != self._request:
                raise EngineError("another request was started on this session before this stream was read to its end; use one session for each")
            logits = self.decode(answer.token_ids[-1]).logits

    def prepare(self, prompt: Prompt, images: Sequence[ImageSource] = (), *, keep_scale: float = 1.0, max_pixels: int | None = None) -> Prepared:
        """Encode the prompt, run the vision graph on each image, and lay out tokens and positions. The caches stay as they are.

        Raises:
            EngineError: see :meth:`stream`.
        """
        request = read_request(self.engine, self.encoder, prompt, images, keep_scale=keep_scale, max_pixels=max_pixels, dtype=self.backend.dtype)
        return prepare_request(self.engine, self.backend, request)

    def prefill(self, prepared: Prepared) -> Step:
        """Start a new request: the caches hold this prompt afterwards, whatever they held before.

        Raises:
            EngineError: the prompt is longer than the engine was built for.
        """
        sizes = {"text_tokens": prepared.text_tokens, "visual_tokens": prepared.visual_positions.size, "budget": prepared.budget}
        answer_room(self.engine, **sizes)
        self._request += 1
        self._lengths = None
        if self._spoiled:  # an overflow must not reach the next request
            self.backend.clear_caches()
            self._spoiled = False
        step = self._run(prepared, np.zeros(len(self.engine.segments), np.int64))
        self._lengths = prompt_lengths(self.engine.segments, **sizes)
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
            visual_embeds=np.zeros((0, self.engine.shape.visual_width), self.backend.dtype),
            importance=np.zeros(0, np.float32),
            key_bias=np.zeros(0, np.float32),
            visual_positions=np.zeros(0, np.int64),
            survivors=(),
            visual_tokens=0,
            budgets=(),
            vision_seconds=0.0,
        )
        step = self._run(chunk, self._lengths)
        self._lengths = self._lengths + input_ids.size
        self._next_position = chunk.next_position
        return step

    @property
    def room(self) -> int:
        """Text tokens for which every segment's caches still have room."""
        if self._lengths is None:
            return min(segment.capacity for segment in self.engine.segments)
        return min(segment.capacity - int(length) for segment, length in zip(self.engine.segments, self._lengths, strict=True))

    def _push(self, answer: Answer, logits: NDArray[np.float32]) -> str:
        try:
            return answer.push(logits)
        except EngineError:
            self._lengths = None
            raise

    def _run(self, prepared: Prepared, past_lengths: NDArray[np.int64]) -> Step:
        step = run_language(self.backend, prepared, past_lengths)
        self._spoiled = self._spoiled or not np.isfinite(step.logits.max())
        return step
