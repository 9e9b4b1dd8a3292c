"""The HTTP endpoint, driven by the official openai client as it is: answers are the session's, and errors are OpenAI's."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from serving import MODEL, PATIENCE, client, data_url, serving, user, wait_until, wait_until_idle
from vflow.engines import Batcher, Engine, EngineError, RequestCancelled, SamplingParams, Session
from vflow.engines.serve import gate
from vflow.engines.serve.app import model_name
from vflow.engines.serve.options import ServeOptions


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


SMALL, WIDE = picture(24, 32), picture(56, 40)  # 12 and 35 visual tokens


@pytest.fixture(scope="module")
def session(standin: Engine) -> Session:
    return Session(standin, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def batcher(standin: Engine) -> Iterator[Batcher]:
    with Batcher(standin, slots=2, queue_limit=30, provider="cpu", threads=1) as batcher:
        yield batcher
        wait_until_idle(batcher)


@pytest.fixture(scope="module")
def address(batcher: Batcher) -> Iterator[str]:
    with serving(batcher) as address:
        yield address


def ask(client: openai.OpenAI, *messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=list(messages), **{"max_tokens": 12, **options})


def slow(batcher: Batcher, monkeypatch: pytest.MonkeyPatch, *, after: int = 0) -> Callable[[], None]:
    """Hold the language graph, after some calls; the returned function lets it go."""
    language, opened, calls = batcher.backend.language, threading.Event(), iter(range(after))

    def held(**feed: Any) -> Any:
        assert next(calls, None) is not None or opened.wait(PATIENCE)
        return language(**feed)

    monkeypatch.setattr(batcher.backend, "language", held)
    return opened.set


def server_errors(address: str) -> list[str]:
    """Lines of the metrics that count responses of status 500."""
    return [line for line in httpx.get(f"{address}/metrics").text.splitlines() if 'status="500"' in line and "_total" in line]


def test_answers_are_those_of_a_session(address: str, session: Session) -> None:
    openai_client = client(address)
    for images in ([], [SMALL], [SMALL, picture(24, 24, 1)]):
        completion = ask(openai_client, user("hello", *map(data_url, images)))
        expected = session.generate("hello", images, max_new_tokens=12)
        assert completion.choices[0].message.content == expected.text
        assert completion.choices[0].finish_reason == expected.finish_reason
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (expected.prompt_tokens, len(expected.token_ids))
        assert completion.usage.total_tokens == expected.prompt_tokens + len(expected.token_ids)
        assert completion.model_extra["vflow"]["visual_tokens"] == expected.visual_tokens
        assert completion.model_extra["vflow"]["visual_tokens_kept"] == expected.stages[-1].kept
        assert [stage["kept"] for stage in completion.model_extra["vflow"]["stages"]] == [stage.kept for stage in expected.stages]
        assert completion.object == "chat.completion" and completion.model == MODEL


def test_conversations_keep_roles_and_order(address: str, session: Session) -> None:
    question = user("what?", data_url(SMALL))
    completion = ask(
        client(address),
        {"role": "developer", "content": "brief"},
        question,
        {"role": "assistant", "content": "a ring"},
        {"role": "user", "content": "and?"},
    )
    messages = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a ring"},
        {"role": "user", "content": "and?"},
    ]
    assert completion.choices[0].message.content == session.generate(messages, [SMALL], max_new_tokens=12).text


def test_streams_are_the_text_in_pieces(address: str, session: Session) -> None:
    expected = session.generate("hello", [SMALL], max_new_tokens=30)
    stream = ask(client(address), user("hello", data_url(SMALL)), max_tokens=30, stream=True, stream_options={"include_usage": True})
    *chunks, last, usage = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks]
    assert "".join(pieces) == expected.text and len(pieces) > 3
    assert {chunk.choices[0].finish_reason for chunk in chunks} == {None} and last.choices[0].finish_reason == expected.finish_reason
    assert last.model_extra["vflow"]["visual_tokens"] == 12
    assert usage.choices == [] and usage.usage.completion_tokens == len(expected.token_ids)
    assert len({chunk.id for chunk in (*chunks, last, usage)}) == 1
    *_, end = ask(client(address), user("hello"), stream=True)
    assert end.choices[0].finish_reason and end.usage is None


def test_streams_are_events_as_openai_sends_them(address: str) -> None:
    body = {"model": MODEL, "messages": [user("hello")], "max_tokens": 3, "stream": True, "stream_options": {"include_usage": False}}
    *events, done, end = httpx.post(f"{address}/v1/chat/completions", json=body).text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]] == [None] * (len(chunks) - 1) + ["length"]
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize(("built", "served"), [("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-2B-Instruct"), ("/home/me/mine", "mine")])
def test_a_model_is_served_by_its_name_and_without_the_builder_s_folders(standin: Engine, built: str, served: str) -> None:
    assert model_name(replace(standin, model_name=built)) == served


def test_as_many_are_answered_at_a_time_as_there_are_slots(standin: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with Batcher(standin, slots=5, queue_limit=0, provider="cpu", threads=1) as batcher, serving(batcher) as address:
        let_go = slow(batcher, monkeypatch)
        with ThreadPoolExecutor(5) as pool:
            answers = [pool.submit(ask, client(address), user("hello")) for _ in range(5)]
            try:
                wait_until(lambda: batcher.stats().active == 5 or any(answer.done() for answer in answers))
            finally:
                let_go()
            assert all(answer.result(PATIENCE).choices for answer in answers)


def test_sampling_follows_its_seed(address: str, session: Session) -> None:
    for seed in (1, 2):
        completion = ask(client(address), user("hello"), temperature=1.5, top_p=0.9, seed=seed, extra_body={"vflow": {"top_k": 50}})
        sampling = SamplingParams(temperature=1.5, top_k=50, top_p=0.9, seed=seed)
        assert completion.choices[0].message.content == session.generate("hello", max_new_tokens=12, sampling=sampling).text


@pytest.mark.parametrize("stream", [False, True])
def test_answers_end_before_a_stop_string(address: str, session: Session, stream: bool) -> None:
    whole = session.generate("hello", max_new_tokens=30).text
    stop = whole[7:9]
    answer = ask(client(address), user("hello"), max_tokens=30, stop=[stop, "never said"], stream=stream)
    if stream:
        chunks = list(answer)
        text, reason = "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_a_request_may_spend_less_of_the_visual_budget(address: str, session: Session) -> None:
    completion = ask(client(address), user("hello", data_url(WIDE)), extra_body={"vflow": {"keep_scale": 0.3, "max_pixels": 1500}})
    expected = session.generate("hello", [WIDE], max_new_tokens=12, keep_scale=0.3, max_pixels=1500)
    assert completion.choices[0].message.content == expected.text
    assert completion.model_extra["vflow"]["visual_tokens"] == expected.visual_tokens < 35


def test_many_clients_with_mixed_requests_get_the_answers_given_alone(address: str, session: Session) -> None:
    rng = random.Random(0)
    requests = [("hello " * rng.randint(1, 5), [picture(8 * rng.randint(2, 5), 8 * rng.randint(2, 5), n)] if n % 3 else []) for n in range(24)]

    def answer(request: tuple[str, list[np.ndarray]]) -> str:
        prompt, images = request
        completion = ask(client(address), user(prompt, *map(data_url, images)), max_tokens=20, stream=bool(images))
        if not images:
            return str(completion.choices[0].message.content)
        return "".join(chunk.choices[0].delta.content or "" for chunk in completion)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(answer, requests))
    assert answers == [session.generate(prompt, images, max_new_tokens=20).text for prompt, images in requests]


def test_the_model_is_listed_and_no_other_is_answered_for(address: str) -> None:
    openai_client = client(address)
    assert [model.id for model in openai_client.models.list()] == [MODEL] and openai_client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError, match="model 'gpt' is not served here; use 'stand-in'") as caught:
        openai_client.chat.completions.create(model="gpt", messages=[user("hello")])
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("some/other")


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        ({"n": 2}, "n: Input should be less than or equal to 1", "n"),
        ({"logprobs": True}, "must be false: this server does not have it", "logprobs"),
        ({"response_format": {"type": "json_object"}}, "type: Input should be 'text'", "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: List should have at most 0 items", "tools"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: ", "frequency_penalty"),
        ({"temperature": 3}, "temperature: ", "temperature"),
        ({"stream_options": {"include_usage": True}}, "stream_options need stream", None),
        ({"extra_body": {"top_kk": 3}}, "top_kk: unknown field", "top_kk"),
        ({"extra_body": {"vflow": {"keep": 0.1}}}, "keep: unknown field", "vflow"),
        ({"messages": []}, "messages: ", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages", "messages[0]"),
        ({"messages": [user("<|im_end|>")]}, "structures prompts", None),
        ({"messages": [user("x" * 300)]}, "prompt has", None),
        ({"max_tokens": 1000}, "max_new_tokens 1000 is more than", None),
        ({"stop": ["a"] * 5}, "stop: List should have at most 4 items", "stop"),
        ({"stop": "a" * 1001}, "stop: String should have at most 1000 characters", "stop"),
        ({"messages": [user("x", "data:image/png;base64,é")]}, "image 1: not base64", None),
        ({"messages": [user("x", "data:image/png;base64,%%%")]}, "image 1: not base64", None),
        ({"messages": [user("x", "data:image/png,xx")]}, "image 1: a data URL must be", None),
        ({"messages": [user("x", "data:image/png;base64,aGVsbG8=")]}, "image 1: not an image of PNG", None),
        ({"messages": [user("x", "https://example.com/a.png")]}, "this server fetches no images", None),
        ({"messages": [user("x", "file:///etc/passwd")]}, "this server fetches no images", None),
        ({"messages": [user("x", data_url(picture(64, 64)))]}, "max_visual_tokens 40 built", None),
    ],
)
def test_what_would_change_the_answer_and_is_not_there_is_refused(
    batcher: Batcher, address: str, options: dict[str, Any], message: str, param: str | None
) -> None:
    before = batcher.stats()
    with pytest.raises(openai.BadRequestError) as caught:
        client(address).chat.completions.create(**{"model": MODEL, "messages": [user("hello")], **options})
    assert message in caught.value.body["message"]  # type: ignore[index]
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert batcher.stats() == before  # it has not taken a place


def test_neutral_values_of_what_is_not_there_are_taken(address: str, session: Session) -> None:
    completion = ask(
        client(address), user("hello"), n=1, logprobs=False, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, tools=[], user="me",
        response_format={"type": "text"}, store=False, metadata={"a": "b"},
    )  # fmt: skip
    assert completion.choices[0].message.content == session.generate("hello", max_new_tokens=12).text


@pytest.mark.parametrize(
    "body",
    [
        rb'{"model": "stand-in", "messages": [{"role": "user", "content": "\ud800"}]}',
        b"",
        b"{",
        b"[1]",
        b"\xff",
        b"[" * 100_000,
        b'{"model": NaN}',
        b"null",
    ],
)
def test_bodies_that_are_no_request_are_refused(address: str, body: bytes) -> None:
    response = httpx.post(f"{address}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.post(f"{address}/v1/chat/completions", content=b"{}").status_code == 400  # without its type
    assert httpx.get(f"{address}/v1/chat/completions").json()["error"]["type"] == "invalid_request_error"


def test_paths_and_methods_that_are_not_there_are_refused_in_the_same_shape(address: str) -> None:
    nowhere, wrong = httpx.get(f"{address}/v1/completions"), httpx.get(f"{address}/v1/chat/completions")
    assert (nowhere.status_code, nowhere.json()["error"]["message"]) == (404, "Not Found: see /openapi.json")
    assert (wrong.status_code, wrong.headers["Allow"], wrong.json()["error"]["message"]) == (405, "POST", "Method Not Allowed: see /openapi.json")


def test_a_fault_of_the_server_itself_is_told_in_the_same_shape(batcher: Batcher, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher, "submit", lambda *_, **__: 1 / 0)
    with pytest.raises(openai.InternalServerError, match=r"internal error \(ZeroDivisionError\); the server's log says more") as caught:
        ask(client(address), user("hello"))
    assert caught.value.type == "server_error"


def test_a_client_that_goes_away_frees_its_slot(batcher: Batcher, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = slow(batcher, monkeypatch, after=5)
    with ask(client(address), user("hello"), max_tokens=100, stream=True) as stream:
        next(iter(stream))
        [job] = batcher._jobs
    wait_until(lambda: job.stop is not None)
    let_go()
    wait_until_idle(batcher)
    assert isinstance(job.outcome, RequestCancelled)


def test_a_client_that_does_not_wait_for_a_whole_answer_frees_its_slot(batcher: Batcher, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = slow(batcher, monkeypatch)
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)  # it holds for the body alone: a client may go away later
    before = server_errors(address)
    with pytest.raises(openai.APITimeoutError):
        ask(client(address, timeout=0.5), user("hello"), max_tokens=100)
    wait_until(lambda: batcher._jobs)
    [job] = batcher._jobs
    wait_until(lambda: job.stop is not None)
    let_go()
    wait_until_idle(batcher)
    assert isinstance(job.outcome, RequestCancelled)
    assert server_errors(address) == before  # it is nobody's fault


def test_a_full_queue_is_429_with_a_time_to_come_back(standin: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with Batcher(standin, slots=1, queue_limit=0, provider="cpu", threads=1) as batcher, serving(batcher) as address:
        let_go = slow(batcher, monkeypatch)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(ask, client(address), user("hello"))
            wait_until(lambda: batcher.stats().active)
            with pytest.raises(openai.RateLimitError, match="0 requests are waiting already") as caught:
                ask(client(address), user("hello"))
            assert caught.value.code == "queue_full" and int(caught.value.response.headers["Retry-After"]) > 0
            let_go()
            assert first.result(PATIENCE).choices
        assert ask(client(address), user("hello")).choices


def test_time_that_runs_out_is_said(standin: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with Batcher(standin, slots=1, provider="cpu", threads=1) as batcher, serving(batcher, ServeOptions(timeout=0.2)) as address:
        language = batcher.backend.language
        monkeypatch.setattr(batcher.backend, "language", lambda **feed: (threading.Event().wait(0.3), language(**feed))[1])
        with pytest.raises(openai.InternalServerError, match=r"not answered within 0\.2 s") as caught:
            ask(client(address), user("hello"))
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")


def test_a_slot_that_fails_is_an_error_of_the_server_and_others_are_answered(
    batcher: Batcher, address: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = batcher.backend.language

    def broken(**feed: Any) -> Any:
        if feed["budget"] == 35:
            raise EngineError("out of memory")
        return language(**feed)

    monkeypatch.setattr(batcher.backend, "language", broken)
    for stream in (False, True):  # before its first token a stream has a status as well
        with pytest.raises(openai.InternalServerError, match="out of memory") as caught:
            ask(client(address), user("hello", data_url(WIDE)), stream=stream)
        assert caught.value.type == "server_error"
    assert ask(client(address), user("hello")).choices[0].message.content == session.generate("hello", max_new_tokens=12).text


def test_a_failure_amid_a_stream_reaches_the_client(batcher: Batcher, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    language, calls = batcher.backend.language, iter(range(100))

    def broken(**feed: Any) -> Any:
        if next(calls) == 8:
            raise EngineError("device lost")
        return language(**feed)

    monkeypatch.setattr(batcher.backend, "language", broken)
    with pytest.raises(openai.APIError, match="device lost"):
        list(ask(client(address), user("hello"), max_tokens=50, stream=True))


def test_while_draining_nothing_is_taken_and_health_says_so(standin: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher(standin, slots=1, provider="cpu", threads=1)
    with serving(batcher) as address, ThreadPoolExecutor(2) as pool:
        assert httpx.get(f"{address}/health").json() == {"status": "ready"}
        let_go = slow(batcher, monkeypatch)
        running = pool.submit(ask, client(address), user("hello"))
        wait_until(lambda: batcher.stats().active)
        closing = pool.submit(batcher.close, PATIENCE)
        wait_until(lambda: batcher.closing)
        health = httpx.get(f"{address}/health")
        assert (health.status_code, health.json()) == (503, {"status": "draining"})
        with pytest.raises(openai.InternalServerError, match="no more requests are taken") as caught:
            ask(client(address), user("hello"))
        assert caught.value.status_code == 503 and int(caught.value.response.headers["Retry-After"]) > 0
        let_go()
        assert running.result(PATIENCE).choices[0].message.content
        closing.result(PATIENCE)


def test_metrics_count_what_happened(standin: Engine) -> None:
    with Batcher(standin, slots=2, provider="cpu", threads=1) as batcher, serving(batcher) as address:
        ask(client(address), user("hello", data_url(SMALL)), max_tokens=3)
        list(ask(client(address), user("hello"), max_tokens=2, stream=True))
        with pytest.raises(openai.BadRequestError):
            ask(client(address), user("hello"), max_tokens=1000)
        text = httpx.get(f"{address}/metrics").text
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        stats = batcher.stats()
    assert float(lines["vflow_visual_tokens_total"]) == 12 and float(lines["vflow_visual_tokens_kept_total"]) == stats.visual_tokens_kept == 3
    assert float(lines['vflow_requests_total{outcome="length"}']) == 2 and float(lines["vflow_generated_tokens_total"]) == 5
    assert float(lines["vflow_prompt_tokens_total"]) == stats.prompt_tokens > 5
    assert float(lines['vflow_http_errors_total{status="400"}']) == 1 and float(lines["vflow_time_to_first_token_seconds_count"]) == 2
    assert float(lines["vflow_request_seconds_count"]) == 2
    assert 0 < float(lines["vflow_time_to_first_token_seconds_sum"]) < float(lines["vflow_request_seconds_sum"])
    assert float(lines["vflow_requests_queued"]) == 0 and float(lines["vflow_slots"]) == 2


def test_the_document_names_what_is_answered(address: str) -> None:
    document = httpx.get(f"{address}/openapi.json").json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) == {"200", "400", "401", "404", "408", "413", "429", "500", "503", "504"}
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "422" not in json.dumps(document)
