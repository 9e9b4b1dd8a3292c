"""Continuous batching: many requests at a time on one engine, each in a slot of the KV caches with lengths of its own.

Two threads work beside those that submit. The vision worker gives the oldest waiting request a slot and runs the vision graph; the language worker
prefills at most one request, then decodes one token for all that have been prefilled, as one batch, and so on. So a request joins while others
decode, and leaves when it ends. The graphs are two sessions of the runtime and run side by side; each has one thread that calls it.

The batch is the first n slots, up to the last one in use, because their caches are one block of memory. A slot among them that is not in use
decodes token 0 into its position 0, where the next prefill writes.
"""

from __future__ import annotations

import heapq
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import TIMEOUT_MAX, Condition, Thread

import numpy as np
from numpy.typing import NDArray

from .answer import Answer
from .backends.base import Backend
from .backends.onnxruntime import OnnxRuntimeBackend
from .errors import EngineError, QueueFull, RequestCancelled, RequestTimeout, ShuttingDown
from .manifest import Engine
from .prompt import Prompt, PromptEncoder
from .request import ImageSource, prepare_request, prompt_lengths, read_request, run_language
from .results import GenerationResult, Prepared, kv_bytes, slot_bytes
from .sampling import SamplingParams
from .ticket import Job, Outcome, Ticket

__all__ = ["Batcher", "BatcherStats", "slots_in"]

DEFAULT_SLOTS = 4
DEFAULT_QUEUE_LIMIT = 16  # a waiting request holds its patches: 24 MB for an image of 1,280 visual tokens
OUTCOMES = ("stop", "length", "cancelled", "timeout", "shutdown", "error")


def slots_in(engine: Engine, kv_memory: int) -> int:
    """How many requests' KV caches fit into ``kv_memory`` bytes.

    Raises:
        EngineError: not even one.
    """
    slots = kv_memory // slot_bytes(engine)
    if slots < 1:
        raise EngineError(
            f"kv_memory of {kv_memory} bytes holds no request, whose KV caches take {slot_bytes(engine)}; give more, or build with a smaller --keep, "
            "--max-visual-tokens or --max-text-tokens"
        )
    return slots


@dataclass(frozen=True)
class BatcherStats:
    """What a batcher is doing and has done.

    Attributes:
        queued: requests without a slot; active: with one; slots: all there are; queue_limit: most that may wait.
        kv_bytes_used, kv_bytes: of slots in use, and of all.
        requests: that have ended, by ``OUTCOMES``.
        prompt_tokens, new_tokens: of requests that have been answered.
        visual_tokens, visual_tokens_kept: of their images, before pruning and after its last stage.
    """

    queued: int
    active: int
    slots: int
    queue_limit: int
    kv_bytes_used: int
    kv_bytes: int
    requests: Mapping[str, int]
    prompt_tokens: int
    new_tokens: int
    visual_tokens: int
    visual_tokens_kept: int


@dataclass
class _Row:
    """A request that decodes: tokens in its caches int64 [segments], and the position of the token chosen last."""

    job: Job
    answer: Answer
    lengths: NDArray[np.int64]
    position: int


class Batcher:
    """An engine that answers several requests at a time. Thread-safe; close it, or use it as a context manager.

    Args:
        engine: from :func:`vflow.engines.open_engine`.
        slots: requests that are answered at a time; kv_memory: bytes of KV caches, as another way to say so. Without either, four.
        queue_limit: requests that may wait for a slot.
        provider: ``cpu`` or ``cuda``; None takes CUDA where it is.
        threads: CPU threads of each graph; None leaves it to the runtime.
        backend: what computes the graphs, with slots of its own; None is ONNX Runtime (the only one that the options above are for).

    Raises:
        EngineError: the engine cannot be loaded on this machine, or its KV caches do not fit.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        slots: int | None = None,
        kv_memory: int | None = None,
        queue_limit: int = DEFAULT_QUEUE_LIMIT,
        provider: str | None = None,
        threads: int | None = None,
        backend: Backend | None = None,
    ) -> None:
        if slots is not None and kv_memory is not None:
            raise EngineError("slots and kv_memory say the same: give one of them")
        if queue_limit < 0:
            raise EngineError(f"queue_limit must be at least 0, got {queue_limit}")
        if slots is None:
            slots = DEFAULT_SLOTS if kv_memory is None else slots_in(engine, kv_memory)
        self.engine = engine
        self.encoder = PromptEncoder(engine.tokenizer_path, engine.chat_template_path, engine.tokens)
        self.backend = backend or OnnxRuntimeBackend(engine, slots=slots, provider=provider, threads=threads)
        self.slots, self.queue_limit = self.backend.slots, queue_limit
        self._slot_bytes = self.backend.cache_bytes // self.slots
        self._changed = Condition()  # guards all below but _rows, which is the language worker's
        self._jobs: set[Job] = set()  # submitted and not ended
        self._waiting: deque[Job] = deque()
        self._free = list(range(self.slots))  # a heap: the lowest first, so that the batch is short
        self._prepared: deque[tuple[Job, Prepared]] = deque()
        self._closing = self._stopped = False
        self._process = os.getpid()
        self._requests = Counter(dict.fromkeys(OUTCOMES, 0))
        self._tokens: Counter[str] = Counter()
        self._rows: dict[int, _Row] = {}
        self._workers = [
            Thread(target=self._run_vision, name="vflow vision", daemon=True),
            Thread(target=self._run_language, name="vflow language", daemon=True),
        ]
        for worker in self._workers:
            worker.start()

    def submit(
        self,
        prompt: Prompt,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        keep_scale: float = 1.0,
        max_pixels: int | None = None,
        timeout: float | None = None,
        on_event: Callable[[str | Outcome], None] | None = None,
    ) -> Ticket:
        """Queue a request, whose prompt and images are read in the calling thread. Arguments as :meth:`Session.stream`, and:

        Args:
            timeout: seconds from now until the end of the answer.
            on_event: called by a worker with each piece of text and in the end with the result or the error, beside what the ticket gives. It must
                not block.

        Raises:
            EngineError: a request that the engine cannot take; the message says what to change.
            QueueFull: too many are waiting.
            ShuttingDown: the batcher is being closed.
        """
        began = time.perf_counter()
        if timeout is not None and not timeout > 0:
            raise EngineError(f"timeout must be more than 0 seconds, got {timeout}")
        self._check_open()  # before any work
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
        job = Job(request, began=began, timeout=timeout, on_event=on_event)
        with self._changed:
            self._check_open()
            self._jobs.add(job)
            self._waiting.append(job)
            self._changed.notify_all()
        return Ticket(job, self._cancel)

    def stats(self) -> BatcherStats:
        """A snapshot."""
        with self._changed:
            used = self.slots - len(self._free)
            return BatcherStats(
                queued=len(self._waiting),
                active=used,
                slots=self.slots,
                queue_limit=self.queue_limit,
                kv_bytes_used=used * self._slot_bytes,
                kv_bytes=self.slots * self._slot_bytes,
                requests=dict(self._requests),
                prompt_tokens=self._tokens["prompt"],
                new_tokens=self._tokens["new"],
                visual_tokens=self._tokens["visual"],
                visual_tokens_kept=self._tokens["kept"],
            )

    @property
    def closing(self) -> bool:
        """Whether no more requests are taken."""
        return self._closing

    def close(self, drain: float = 0.0) -> None:
        """Take no more requests, give those that were taken ``drain`` seconds to end, cancel the rest, and stop the workers."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._jobs, timeout=min(drain, TIMEOUT_MAX))
            for job in self._jobs:
                job.stop = job.stop or ShuttingDown("shut down before the answer had ended; ask again")
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._jobs)
            self._stopped = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if os.getpid() != self._process:  # its workers stayed behind
            raise EngineError("this batcher was made before the process forked; make one in each process")
        if self._closing:
            raise ShuttingDown("shutting down: no more requests are taken")
        if len(self._jobs) >= self.slots + self.queue_limit:
            raise QueueFull(f"{self.queue_limit} requests are waiting already; try again later")

    def _cancel(self, job: Job) -> None:
        if not job.ended.is_set():
            job.stop = job.stop or RequestCancelled("cancelled")
            with self._changed:
                self._changed.notify_all()

    def _run_vision(self) -> None:
        """The vision worker."""
        while (job := self._next_waiting()) is not None:
            if stop := job.over():
                self._end(job, stop)
                continue
            try:
                prepared = prepare_request(self.engine, self.backend, job.request)
            except Exception as error:  # whatever it is, it is this request's; the worker goes on
                self._end(job, _as_engine_error(error))
                continue
            job.request = replace(job.request, patches=())  # most of its memory
            with self._changed:
                self._prepared.append((job, prepared))
                self._changed.notify_all()

    def _next_waiting(self) -> Job | None:
        """A request that is over before it has got a slot, or else the oldest as soon as there is one; None in the end."""
        with self._changed:
            while not self._stopped:
                for job in self._waiting:
                    if job.over():
                        self._waiting.remove(job)
                        return job
                if self._waiting and self._free:
                    job = self._waiting.popleft()
                    job.slot = heapq.heappop(self._free)
                    return job
                deadlines = [job.deadline for job in self._waiting if job.deadline is not None]
                self._changed.wait(min(max(0.0, min(deadlines) - time.perf_counter()), TIMEOUT_MAX) if deadlines else None)
            return None

    def _run_language(self) -> None:
        """The language worker."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._prepared or self._rows)
                if self._stopped:
                    return
                joining = self._prepared.popleft() if self._prepared else None
            if joining is not None:
                self._prefill(*joining)
                joining = None  # its embeddings are not needed any more
            self._decode()

    def _prefill(self, job: Job, prepared: Prepared) -> None:
        """Fill the request's slot with its prompt, and choose the first token."""
        if stop := job.over():
            self._leave(job, stop)
            return
        assert job.slot is not None
        segments = self.engine.segments
        try:
            answer = Answer(self.engine, self.encoder.decode, job.request, prepared, began=job.began)
            step = run_language(self.backend, prepared, np.zeros(len(segments), np.int64), job.slot)
        except Exception as error:  # as in the vision worker
            self._fail([job], error)
            return
        lengths = prompt_lengths(segments, text_tokens=prepared.text_tokens, visual_tokens=prepared.visual_positions.size, budget=prepared.budget)
        row = self._rows[job.slot] = _Row(job, answer, lengths, prepared.next_position)
        self._push(row, step.logits)

    def _decode(self) -> None:
        """One token for each request that has been prefilled."""
        for row in list(self._rows.values()):
            if stop := row.job.over():
                self._leave(row.job, stop)
        if not self._rows:
            return
        try:
            logits = self._decode_step()
        except Exception as error:  # of all that took part, and nobody else
            self._fail([row.job for row in self._rows.values()], error)
            return
        for slot, row in list(self._rows.items()):
            row.lengths, row.position = row.lengths + 1, row.position + 1
            self._push(row, logits[slot])

    def _decode_step(self) -> NDArray[np.float32]:
        """The last token of each row through the language graph: logits float32 [n, vocab_size] of the first n slots."""
        count = max(self._rows) + 1
        tokens = np.zeros((count, 1), np.int64)
        position_ids = np.zeros((3, count, 1), np.int64)
        past_lengths = np.zeros((count, len(self.engine.segments)), np.int64)
        for slot, row in self._rows.items():
            tokens[slot], position_ids[:, slot], past_lengths[slot] = row.answer.token_ids[-1], row.position, row.lengths
        logits, _ = self.backend.language(
            input_ids=tokens,
            position_ids=position_ids,
            visual_embeds=np.zeros((0, self.engine.shape.visual_width), self.backend.dtype),
            visual_positions=np.zeros(0, np.int64),
            importance=np.zeros(0, np.float32),
            key_bias=np.zeros(0, np.float32),
            budget=0,
            past_lengths=past_lengths,
        )
        return logits

    def _push(self, row: _Row, logits: NDArray[np.float32]) -> None:
        """The next token of one request, and what it says."""
        try:
            row.job.deliver(row.answer.push(logits))
            if row.answer.finished:
                self._leave(row.job, row.answer.result(kv_bytes(self.engine, self._slot_bytes)))
        except Exception as error:  # logits that are not finite, or text that cannot be decoded: this request's
            self._fail([row.job], error)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """End requests by an error of the language graph, and leave nothing in their slots that is not finite."""
        with suppress(Exception):  # from a device that is out of order; what counts is that everybody hears of the first error
            self.backend.clear_caches(jobs[0].slot if len(jobs) == 1 else None)
        for job in jobs:
            self._leave(job, _as_engine_error(error))

    def _leave(self, job: Job, outcome: Outcome) -> None:
        """End a request that the language worker has."""
        assert job.slot is not None
        self._rows.pop(job.slot, None)
        self._end(job, outcome)

    def _end(self, job: Job, outcome: Outcome) -> None:
        """Free the slot, count, and tell, in this order: who has been told finds the slot free."""
        with self._changed:
            self._jobs.discard(job)
            if job.slot is not None:
                heapq.heappush(self._free, job.slot)
            self._requests[_kind(outcome)] += 1
            if isinstance(outcome, GenerationResult):
                self._tokens.update(prompt=outcome.prompt_tokens, new=len(outcome.token_ids))
                self._tokens.update(visual=outcome.visual_tokens, kept=outcome.visual_tokens_kept)
            self._changed.notify_all()
        job.end(outcome)


def _kind(outcome: Outcome) -> str:
    if isinstance(outcome, GenerationResult):
        return outcome.finish_reason
    kinds = {RequestCancelled: "cancelled", RequestTimeout: "timeout", ShuttingDown: "shutdown"}
    return kinds.get(type(outcome), "error")


def _as_engine_error(error: Exception) -> EngineError:
    if isinstance(error, EngineError):
        return error
    wrapped = EngineError(f"the request failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
