"""An answer that grows token by token, until a stop token, a stop string or the length that was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .manifest import Engine
from .request import Request
from .results import GenerationResult, KvBytes, Prepared, stage_counts
from .sampling import next_token
from .text_stream import StopStrings, TextStream

__all__ = ["Answer"]


class Answer:
    """One answer: the tokens so far, their text, and what they took.

    Args:
        decode: text of token ids, without special tokens.
        prepared: read here and not kept.
        began: ``time.perf_counter()`` when the request was made.
    """

    def __init__(self, engine: Engine, decode: Callable[[Sequence[int]], str], request: Request, prepared: Prepared, *, began: float) -> None:
        self.token_ids: list[int] = []
        self.finished = False
        self._limit, self._sampling, self._stop = request.max_new_tokens, request.sampling, engine.tokens.stop
        self._generator = np.random.default_rng(request.sampling.seed)
        self._stream, self._stops = TextStream(decode), StopStrings(request.stop)
        self._pieces: list[str] = []
        self._prompt_tokens, self._visual_tokens = prepared.input_ids.size, prepared.visual_tokens
        self._stages, self._vision_seconds = stage_counts(engine, prepared.budgets), prepared.vision_seconds
        self._began = began
        self._prefill_began = self._first_token = self._last_token = time.perf_counter()
        self._prefill_seconds = 0.0

    def push(self, logits: NDArray[np.float32]) -> str:
        """Choose the next token from ``logits`` float32 [vocab_size]; returns the text that it completes, often nothing.

        Raises:
            EngineError: logits that are not finite.
        """
        now = time.perf_counter()
        token = next_token(logits, self._sampling, self._generator)
        self._last_token = time.perf_counter()
        if not self.token_ids:
            self._prefill_seconds, self._first_token = now - self._prefill_began, self._last_token
        self.token_ids.append(token)
        stopped = token in self._stop
        last = stopped or len(self.token_ids) == self._limit
        text = "" if stopped else self._stream.push(token)
        piece = self._stops.push(text + self._stream.finish() if last else text, last=last)
        self.finished = last or self._stops.found
        self._pieces.append(piece)
        return piece

    def result(self, kv_bytes: KvBytes) -> GenerationResult:
        """The whole, of a finished answer."""
        decode_seconds = self._last_token - self._first_token
        return GenerationResult(
            text="".join(self._pieces),
            token_ids=tuple(self.token_ids),
            finish_reason="stop" if self._stops.found or self.token_ids[-1] in self._stop else "length",
            prompt_tokens=self._prompt_tokens,
            visual_tokens=self._visual_tokens,
            stages=self._stages,
            kv_bytes=kv_bytes,
            vision_s=self._vision_seconds,
            prefill_s=self._prefill_seconds,
            ttft_s=self._first_token - self._began,
            tokens_per_s=(len(self.token_ids) - 1) / decode_seconds if len(self.token_ids) > 1 else None,
        )
