"""The batcher: every answer is the one given alone, whatever else is going on, and no slot is lost, whatever happens."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import picture as blocks
from vflow.engines import (
    Batcher,
    Engine,
    EngineError,
    GenerationResult,
    PromptError,
    QueueFull,
    RequestCancelled,
    RequestTimeout,
    SamplingParams,
    Session,
    ShuttingDown,
    open_engine,
)
from vflow.engines.backends.onnxruntime import OnnxRuntimeBackend
from vflow.engines.batcher import slots_in
from vflow.engines.results import slot_bytes
from vflow.exporter.schedule import Schedule, Stage

MakeStandin = Callable[..., Path]
PATIENCE = 30.0  # seconds that a test waits for what must happen; reached only where it is red


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


SMALL, WIDE = picture(24, 32), picture(56, 40)  # 4 x 3 = 12 and 5 x 7 = 35 visual tokens of 8 x 8 pixels


def some_requests(count: int, seed: int = 0) -> list[tuple[str, list[np.ndarray], dict[str, Any]]]:
    """Prompts of several lengths with no, one or two images, greedy and sampled."""
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        images = [picture(8 * rng.randint(2, 4), 8 * rng.randint(2, 4), rng.randrange(99)) for _ in range(rng.choice([0, 1, 1, 2]))]
        options: dict[str, Any] = {"max_new_tokens": rng.randint(1, 40)}
        if number % 3 == 2:
            options["sampling"] = SamplingParams(temperature=1.5, top_p=0.9, seed=number)
        if number % 5 == 4:
            options["keep_scale"] = 0.5
        requests.append(("hello " * rng.randint(1, 6), images, options))
    return requests


@pytest.fixture(scope="module")
def session(standin: Engine) -> Session:
    return Session(standin, provider="cpu", threads=1)


@pytest.fixture
def batcher(standin: Engine) -> Iterator[Batcher]:
    with Batcher(standin, slots=3, queue_limit=50, provider="cpu", threads=1) as batcher:
        yield batcher
        assert_all_slots_are_free(batcher)


def assert_all_slots_are_free(batcher: Batcher) -> None:
    """Soon: what was cancelled leaves at the next step."""
    end = time.monotonic() + PATIENCE
    while (stats := batcher.stats()).active or stats.queued:
        assert time.monotonic() < end, f"slots were lost: {stats}"
        time.sleep(0.005)
    assert (stats.kv_bytes_used, sorted(batcher._free), batcher._rows, batcher._jobs) == (0, list(range(batcher.slots)), {}, set())


class Gate:
    """Holds the language graph before each call, until opened for some calls or for all."""

    def __init__(self, batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self._passes = threading.Event(), threading.Semaphore(0)
        language = batcher.backend.language

        def held(**feed: Any) -> Any:
            self.reached.set()
            assert self._passes.acquire(timeout=PATIENCE)
            return language(**feed)

        monkeypatch.setattr(batcher.backend, "language", held)

    def open(self, calls: int = 100_000) -> None:
        self._passes.release(calls)


@pytest.mark.parametrize("schedule", [None, Schedule(), Schedule(stages=(Stage("decoder", 1, 300), Stage("decoder", 2, 100)))])
def test_every_answer_is_the_one_given_alone(make_standin: MakeStandin, schedule: Schedule | None) -> None:
    engine = open_engine(make_standin(**({} if schedule is None else {"schedule": schedule}), max_text_tokens=200))
    alone, requests = Session(engine, provider="cpu", threads=1), some_requests(24)
    with Batcher(engine, slots=5, queue_limit=len(requests), provider="cpu", threads=1) as batcher:
        tickets = [batcher.submit(prompt, images, **options) for prompt, images, options in requests]
        results = [ticket.result(PATIENCE) for ticket in tickets]
        for result, (prompt, images, options) in zip(results, requests, strict=True):
            expected = alone.generate(prompt, images, **options)
            assert (result.token_ids, result.text, result.finish_reason) == (expected.token_ids, expected.text, expected.finish_reason)
            assert (result.stages, result.kv_bytes, result.prompt_tokens) == (expected.stages, expected.kv_bytes, expected.prompt_tokens)
        assert_all_slots_are_free(batcher)
        stats = batcher.stats()
        assert sum(stats.requests.values()) == len(requests) and stats.new_tokens == sum(len(result.token_ids) for result in results)
        assert stats.visual_tokens == sum(result.visual_tokens for result in results)


def test_rows_that_decoder_layers_add_to_are_decoded_as_if_alone(build: Callable[..., Engine], deepstack_checkpoint: Path) -> None:
    engine = build(deepstack_checkpoint, Schedule((Stage("decoder", 0, 500, 2.0), Stage("decoder", 1, 250))))
    alone = Session(engine, provider="cpu", threads=1)
    requests: list[tuple[str, list[Any]]] = [("what color", [blocks(3, 4, seed=1)]), ("how many", []), ("what", [blocks(2, 5, 2), blocks(1, 3, 3)])]
    with Batcher(engine, slots=3, provider="cpu", threads=1) as batcher:
        tickets = [batcher.submit(prompt, images, max_new_tokens=6) for prompt, images in requests]
        for ticket, (prompt, images) in zip(tickets, requests, strict=True):
            assert ticket.result(PATIENCE).token_ids == alone.generate(prompt, images, max_new_tokens=6).token_ids


def test_what_a_slot_adds_to_attention_scores_is_its_own(build: Callable[..., Engine], random_checkpoint: Path) -> None:
    """An engine with proportional attention keeps that beside the caches, for each slot and segment."""
    stages = (Stage("decoder", 0, 400, 2.0), Stage("decoder", 2, 200))
    engine = build(random_checkpoint, Schedule(stages, proportional_attention=2.0))
    alone = Session(engine, provider="cpu", threads=1)
    requests = [("how many objects are there ?", [blocks(4, 6, seed)] if seed % 3 else [], {"max_new_tokens": 3 + seed}) for seed in range(9)]
    with Batcher(engine, slots=4, queue_limit=len(requests), provider="cpu", threads=1) as batcher:
        assert batcher.backend.cache_bytes == 4 * slot_bytes(engine)
        tickets = [batcher.submit(prompt, images, **options) for prompt, images, options in requests]
        answers = [ticket.result(PATIENCE) for ticket in tickets]
    for answer, (prompt, images, options) in zip(answers, requests, strict=True):
        expected = alone.generate(prompt, images, **options)
        assert (answer.token_ids, answer.kv_bytes) == (expected.token_ids, expected.kv_bytes)


def test_exported_graphs_answer_in_a_batch_as_alone(build: Callable[..., Engine], random_checkpoint: Path) -> None:
    schedule = Schedule((Stage("decoder", 1, 600), Stage("decoder", 2, 300)), guidance_weight=0.4)  # tests of the export build it as well
    engine = build(random_checkpoint, schedule)
    requests = [("what color is the object ?", [blocks(1 + n % 5, 2 + n % 7, n)] if n % 4 else []) for n in range(12)]
    alone = Session(engine, provider="cpu", threads=1)
    with Batcher(engine, slots=4, provider="cpu", threads=1) as batcher:
        tickets = [batcher.submit(prompt, images, max_new_tokens=20) for prompt, images in requests]
        for (prompt, images), ticket in zip(requests, tickets, strict=True):
            assert ticket.result(PATIENCE).token_ids == alone.generate(prompt, images, max_new_tokens=20).token_ids


def test_half_precision_answers_in_a_batch(make_standin: MakeStandin) -> None:
    engine = open_engine(make_standin(precision="fp16"))
    with Batcher(engine, slots=2, provider="cpu", threads=1) as batcher:
        tickets = [batcher.submit("hello", [SMALL], max_new_tokens=4) for _ in range(3)]
        assert len({ticket.result(PATIENCE).token_ids for ticket in tickets}) == 1
        assert batcher.stats().kv_bytes == batcher.backend.cache_bytes == 2 * slot_bytes(engine)


def test_others_decode_between_two_prefills(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []  # rows and columns of each call
    gate = Gate(batcher, monkeypatch)
    held = batcher.backend.language
    monkeypatch.setattr(batcher.backend, "language", lambda **feed: (steps.append(feed["input_ids"].shape), held(**feed))[1])
    tickets = [batcher.submit("hello", [SMALL], max_new_tokens=6) for _ in range(3)]
    gate.open()
    for ticket in tickets:
        ticket.result(PATIENCE)
    prefills = [number for number, (_, columns) in enumerate(steps) if columns > 1]
    assert len(prefills) == 3 and all(second - first > 1 for first, second in pairwise(prefills))
    assert max(rows for rows, _ in steps) > 1, "nothing was decoded as a batch"


def test_a_slot_that_nobody_uses_disturbs_nobody(batcher: Batcher, session: Session) -> None:
    """The batch is the first n slots: those free among them decode something as well, into their first place."""
    expected = session.generate("hello", [SMALL], max_new_tokens=40).token_ids
    first = batcher.submit("x", max_new_tokens=2)  # slot 0
    second = batcher.submit("hello", [SMALL], max_new_tokens=40)  # slot 1, alone after a few steps
    first.result(PATIENCE)
    third = batcher.submit("hello", [SMALL], max_new_tokens=40)  # slot 0, which has decoded garbage by now
    assert second.result(PATIENCE).token_ids == third.result(PATIENCE).token_ids == expected


def test_garbage_of_a_free_slot_is_overwritten_by_its_next_prompt(standin: Engine) -> None:
    backend = OnnxRuntimeBackend(standin, slots=2, provider="cpu", threads=1)
    alone = Session(standin, backend=backend)
    prepared = alone.prepare("hello", [SMALL])
    alone.prefill(prepared)
    clean = {(layer, kind): backend.cache_array(layer, kind)[0] for layer in range(3) for kind in ("key", "value")}
    text = {
        "visual_embeds": np.zeros((0, 16), np.float32),
        "visual_positions": np.zeros(0, np.int64),
        "importance": np.zeros(0, np.float32),
        "key_bias": np.zeros(0, np.float32),
        "budget": 0,
    }
    backend.language(input_ids=np.array([[5], [6]]), position_ids=np.zeros((3, 2, 1), np.int64), past_lengths=np.zeros((2, 2), np.int64), **text)
    assert all((backend.cache_array(*which)[0] != array).any() for which, array in clean.items())
    alone.prefill(prepared)
    for which, array in clean.items():
        np.testing.assert_array_equal(backend.cache_array(*which)[0], array)


def test_the_rows_of_a_batch_are_the_slots_of_the_caches(standin: Engine) -> None:
    backend = OnnxRuntimeBackend(standin, slots=3, provider="cpu", threads=1)
    before = backend.cache_pointers()
    feed = {
        "visual_embeds": np.zeros((0, 16), np.float32),
        "visual_positions": np.zeros(0, np.int64),
        "importance": np.zeros(0, np.float32),
        "key_bias": np.zeros(0, np.float32),
        "budget": 0,
    }
    backend.language(input_ids=np.array([[7]]), position_ids=np.zeros((3, 1, 1), np.int64), past_lengths=np.array([[4, 4]]), slot=2, **feed)
    filled = np.abs(backend.cache_array(0, "key")).sum(axis=(1, 3)) > 0  # [slots, capacity]
    assert np.argwhere(filled).tolist() == [[2, 4]]
    lengths = np.array([[1, 1], [2, 2]])
    logits, hidden = backend.language(input_ids=np.array([[7], [8]]), position_ids=np.zeros((3, 2, 1), np.int64), past_lengths=lengths, **feed)
    filled = np.abs(backend.cache_array(2, "value")).sum(axis=(1, 3)) > 0
    assert np.argwhere(filled).tolist() == [[0, 1], [1, 2], [2, 4]]
    assert logits.shape[0] == hidden.shape[0] == 2 and backend.cache_pointers() == before
    backend.clear_caches(1)
    filled = np.abs(backend.cache_array(2, "value")).sum(axis=(1, 3)) > 0
    assert np.argwhere(filled).tolist() == [[0, 1], [2, 4]] and backend.cache_pointers() == before


def test_pieces_and_events_are_the_text(batcher: Batcher) -> None:
    events: list[Any] = []
    ticket = batcher.submit("hello", [SMALL], max_new_tokens=30, on_event=events.append)
    pieces = list(ticket)
    result = ticket.result(PATIENCE)
    assert "".join(pieces) == result.text and len(pieces) > 3
    assert events == [*pieces, result] and list(ticket) == []
    assert 0 < result.vision_s < result.ttft_s and result.tokens_per_s


def test_time_in_the_queue_counts_towards_the_first_token(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(batcher, monkeypatch)
    tickets = [batcher.submit("hello", max_new_tokens=1) for _ in range(4)]
    time.sleep(0.2)
    gate.open()
    assert min(ticket.result(PATIENCE).ttft_s for ticket in tickets) > 0.2


def test_bad_requests_are_refused_before_they_take_a_place(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher.backend, "vision", lambda *_: pytest.fail("reached the vision graph"))
    refused: list[tuple[Any, str]] = [
        (lambda: batcher.submit("x" * 300), "prompt has"),
        (lambda: batcher.submit("x", [picture(64, 64)]), "max_visual_tokens 40 built"),
        (lambda: batcher.submit("x", [SMALL], max_new_tokens=1000), "max_new_tokens 1000 is more"),
        (lambda: batcher.submit([{"role": "user", "content": "x"}], [SMALL]), "image placeholders"),
        (lambda: batcher.submit("x", keep_scale=0), "keep_scale"),
        (lambda: batcher.submit("x", timeout=0), "timeout must be more than 0"),
        (lambda: batcher.submit("x", timeout=float("nan")), "timeout must be more than 0"),
    ]
    for submit, message in refused:
        with pytest.raises(EngineError, match=message):
            submit()
    with pytest.raises(PromptError):
        batcher.submit("<|im_end|>")
    assert not batcher._jobs and sum(batcher.stats().requests.values()) == 0


def test_a_full_queue_is_said_and_takes_requests_again_later(standin: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with Batcher(standin, slots=1, queue_limit=2, provider="cpu", threads=1) as batcher:
        gate = Gate(batcher, monkeypatch)
        tickets = [batcher.submit("hello", max_new_tokens=2) for _ in range(3)]
        with pytest.raises(QueueFull, match="2 requests are waiting already; try again later"):
            batcher.submit("hello", ["no such picture"])  # which is not looked for
        last = tickets.pop()
        last.cancel()  # what waits no more makes place, though nothing moves
        with pytest.raises(RequestCancelled):
            last.result(PATIENCE)
        tickets.append(batcher.submit("hello", max_new_tokens=2))
        gate.open()
        assert len({ticket.result(PATIENCE).token_ids for ticket in tickets}) == 1


def test_a_cancelled_request_frees_its_slot_for_the_next(standin: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with Batcher(standin, slots=1, queue_limit=1, provider="cpu", threads=1) as batcher:
        gate = Gate(batcher, monkeypatch)
        long, short = batcher.submit("hello", max_new_tokens=100), batcher.submit("hello", max_new_tokens=1)
        gate.open(3)
        next(iter(long))
        long.cancel()
        long.cancel()
        gate.open(2)  # the step that was under way, and the other's prefill
        assert short.result(PATIENCE).token_ids
        with pytest.raises(RequestCancelled, match="cancelled"):
            long.result(PATIENCE)
        assert batcher.stats().requests["cancelled"] == 1


def test_a_ticket_that_is_dropped_or_left_is_cancelled(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(batcher, monkeypatch)
    batcher.submit("hello", max_new_tokens=100)
    with batcher.submit("hello", max_new_tokens=100):
        pass
    gate.open(6)
    for _ in batcher.submit("hello", max_new_tokens=100):
        break
    gc.collect()
    gate.open(1)
    assert_all_slots_are_free(batcher)
    assert batcher.stats().requests["cancelled"] == 3


def test_time_runs_out_in_the_queue_and_while_answering(standin: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with Batcher(standin, slots=1, provider="cpu", threads=1) as batcher:
        gate = Gate(batcher, monkeypatch)
        answering = batcher.submit("hello", max_new_tokens=100, timeout=0.2)
        waiting = batcher.submit("hello", max_new_tokens=1, timeout=0.1)
        unhurried = batcher.submit("hello", max_new_tokens=1)
        with pytest.raises(RequestTimeout, match=r"not answered within 0\.1 s"):
            waiting.result(PATIENCE)
        time.sleep(0.2)
        gate.open()
        with pytest.raises(RequestTimeout, match=r"not answered within 0\.2 s"):
            answering.result(PATIENCE)
        assert unhurried.result(PATIENCE).token_ids
        assert_all_slots_are_free(batcher)
        assert batcher.stats().requests["timeout"] == 2


def failing_on(batcher: Batcher, monkeypatch: pytest.MonkeyPatch, graph: str, fails: Callable[..., bool], error: Exception) -> None:
    """Let a graph raise ``error`` where its arguments are such."""
    run = getattr(batcher.backend, graph)

    def broken(*inputs: Any, **feed: Any) -> Any:
        if fails(*inputs, **feed):
            raise error
        return run(*inputs, **feed)

    monkeypatch.setattr(batcher.backend, graph, broken)


@pytest.mark.parametrize(
    ("graph", "fails"),
    [("vision", lambda pixels, *_: pixels.shape[:2] == (5, 7)), ("language", lambda **feed: feed["budget"] == 35)],
    ids=["vision", "prefill"],
)
@pytest.mark.parametrize("error", [EngineError("out of memory"), RuntimeError("out of memory")], ids=["said", "unforeseen"])
def test_a_request_that_fails_takes_nobody_along(
    batcher: Batcher, session: Session, monkeypatch: pytest.MonkeyPatch, graph: str, fails: Any, error: Exception
) -> None:
    failing_on(batcher, monkeypatch, graph, fails, error)
    tickets = [batcher.submit("hello", [image], max_new_tokens=30) for image in (SMALL, WIDE, SMALL, WIDE, SMALL)]
    expected = session.generate("hello", [SMALL], max_new_tokens=30).token_ids
    for number in (1, 3):
        with pytest.raises(EngineError, match="out of memory"):
            tickets[number].result(PATIENCE)
    assert {tickets[number].result(PATIENCE).token_ids for number in (0, 2, 4)} == {expected}
    assert batcher.stats().requests["error"] == 2


def test_a_batch_that_fails_is_told_to_all_in_it_and_the_next_is_answered(
    batcher: Batcher, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, gate = iter([True]), Gate(batcher, monkeypatch)

    def when_all_slots_decode(**feed: Any) -> bool:
        if len(feed["input_ids"]) < 3:
            time.sleep(0.005)  # the others are to be in their slots before the first answer ends
        return len(feed["input_ids"]) == 3 and next(failures, False)

    failing_on(batcher, monkeypatch, "language", when_all_slots_decode, EngineError("device lost"))
    tickets = [batcher.submit("hello", [SMALL], max_new_tokens=40) for _ in range(5)]
    gate.open()
    outcomes = []
    for ticket in tickets:
        try:
            outcomes.append(ticket.result(PATIENCE).token_ids)
        except EngineError as error:
            outcomes.append(str(error))
    expected = session.generate("hello", [SMALL], max_new_tokens=40).token_ids
    assert outcomes == ["device lost"] * 3 + [expected] * 2


def test_logits_that_overflow_end_one_request_and_poison_no_slot(batcher: Batcher, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = batcher.backend.vision

    def broken(pixels: np.ndarray, *rest: Any) -> Any:
        image = vision(pixels, *rest)
        return image._replace(visual_embeds=np.full_like(image.visual_embeds, np.nan)) if pixels.shape[:2] == (5, 7) else image

    monkeypatch.setattr(batcher.backend, "vision", broken)
    tickets = [batcher.submit("hello", [image], max_new_tokens=20) for image in (WIDE, WIDE, SMALL, WIDE, SMALL, SMALL, SMALL)]
    expected = session.generate("hello", [SMALL], max_new_tokens=20).token_ids
    for number in (0, 1, 3):
        with pytest.raises(EngineError, match="not finite"):
            tickets[number].result(PATIENCE)
    assert {tickets[number].result(PATIENCE).token_ids for number in (2, 4, 5, 6)} == {expected}


@pytest.mark.parametrize("error", [LookupError("gone"), SystemExit("gone")])
def test_a_listener_that_raises_ends_its_own_request_only(batcher: Batcher, error: BaseException) -> None:
    heard = []

    def broken(event: object) -> None:
        heard.append(event)
        raise error

    tickets = [batcher.submit("hello", max_new_tokens=30, on_event=on_event) for on_event in (broken, None)]
    with pytest.raises(EngineError, match=f"on_event raised {type(error).__name__}: gone"):
        tickets[0].result(PATIENCE)
    assert isinstance(tickets[1].result(PATIENCE), GenerationResult)
    assert len(heard) == 1


def test_a_batcher_of_another_process_says_so(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fork its workers are not there, and nothing would ever be answered."""
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(EngineError, match="made before the process forked; make one in each process"):
        batcher.submit("hello")


def test_closing_lets_requests_end_and_takes_no_more(standin: Engine) -> None:
    batcher = Batcher(standin, slots=1, provider="cpu", threads=1)
    tickets = [batcher.submit("hello", max_new_tokens=5, timeout=1e15) for _ in range(3)]  # longer than the platform can wait
    batcher.close(drain=1e15)
    assert batcher.closing and len({ticket.result(0).token_ids for ticket in tickets}) == 1
    with pytest.raises(ShuttingDown, match="no more requests are taken"):
        batcher.submit("hello")
    batcher.close()
    assert not any(worker.is_alive() for worker in batcher._workers)


def test_closing_at_once_ends_what_is_running_and_what_waits(standin: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher(standin, slots=1, provider="cpu", threads=1)
    gate = Gate(batcher, monkeypatch)
    tickets = [batcher.submit("hello", max_new_tokens=100) for _ in range(3)]
    assert gate.reached.wait(PATIENCE)
    threading.Timer(0.1, gate.open).start()
    batcher.close()
    for ticket in tickets:
        with pytest.raises(ShuttingDown, match="before the answer had ended"):
            ticket.result(0)
    assert batcher.stats().requests["shutdown"] == 3


@pytest.mark.parametrize("seed", range(3))
def test_no_slot_is_lost_in_a_storm(standin: Engine, session: Session, seed: int) -> None:
    """Threads that submit, cancel, drop, run out of time and read to the end, at random: what is answered is right, and all slots come back."""
    requests = some_requests(10, seed)
    expected = [session.generate(prompt, images, **options).token_ids for prompt, images, options in requests]
    wrong: list[str] = []

    def client(number: int) -> None:
        rng = random.Random(1000 * seed + number)
        for _ in range(12):
            place = rng.randrange(len(requests))
            prompt, images, options = requests[place]
            try:
                ticket = batcher.submit(prompt, images, **options, timeout=rng.choice([None, None, 0.001, 0.02]))
                match rng.randrange(4):
                    case 0:
                        time.sleep(rng.random() * 0.01)
                        ticket.cancel()
                    case 1:
                        next(iter(ticket), None)
                        del ticket
                        continue
                if ticket.result(PATIENCE).token_ids != expected[place]:
                    wrong.append(f"request {place}")
            except (RequestCancelled, RequestTimeout, QueueFull):
                continue
            except Exception as error:
                wrong.append(repr(error))

    with Batcher(standin, slots=3, queue_limit=3, provider="cpu", threads=1) as batcher:
        clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(PATIENCE)
        gc.collect()
        assert_all_slots_are_free(batcher)
        ended = batcher.stats().requests
        assert wrong == [] and ended["error"] == 0
        assert min(ended["cancelled"], ended["timeout"], ended["stop"] + ended["length"]) > 0, f"not a storm: {ended}"


def test_memory_decides_how_many_slots_there_are(standin: Engine, make_standin: MakeStandin) -> None:
    one = slot_bytes(standin)
    with Batcher(standin, kv_memory=3 * one + 5, provider="cpu", threads=1) as batcher:
        assert batcher.slots == 3 and batcher.stats().kv_bytes == batcher.backend.cache_bytes == 3 * one
    unpruned = open_engine(make_standin(schedule=Schedule()))
    assert slots_in(standin, 10 * slot_bytes(unpruned)) > 10
    with pytest.raises(EngineError, match=rf"kv_memory of {one - 1} bytes holds no request, whose KV caches take {one}; give more, or build"):
        Batcher(standin, kv_memory=one - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"slots": 1, "kv_memory": 1 << 30}, "slots and kv_memory say the same"),
        ({"queue_limit": -1}, "queue_limit must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(standin: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Batcher(standin, **options)


def test_a_backend_of_one_slot_answers_one_after_the_other(standin: Engine, session: Session) -> None:
    with Batcher(standin, backend=OnnxRuntimeBackend(standin, provider="cpu", threads=1)) as batcher:
        tickets = [batcher.submit("hello", [SMALL], max_new_tokens=8) for _ in range(3)]
        expected = session.generate("hello", [SMALL], max_new_tokens=8).token_ids
        assert {ticket.result(PATIENCE).token_ids for ticket in tickets} == {expected} and batcher.slots == 1
