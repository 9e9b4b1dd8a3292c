"""Engines in a real Triton Inference Server: answers are those of a session, and faults stay with the request that has them."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import DECODER_STAGES, picture
from triton_process import ENDLESS, PATIENCE, SLOW_TOKENS, Answer, TritonProcess, tensors, why_missing
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException
from vflow.engines import Engine, SamplingParams, Session
from vflow.engines.triton_server.interface import INPUTS, OUTPUTS
from vflow.engines.triton_server.settings import Settings
from vflow.exporter.triton_repository import REPOSITORY_FOLDER, repository_name, write_model

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=why_missing() or "")

QUESTION = "how many objects are there ?"
# The model "faulty": the product's, on a backend that fails for images of some sizes in visual tokens, each in its own place.
FAULTY = """
import numpy as np
from vflow.engines import EngineError
from vflow.engines.triton_server.model import TritonPythonModel as Sound


class TritonPythonModel(Sound):
    def initialize(self, args):
        super().initialize(args)
        backend = self._batcher.backend
        vision, language = backend.vision, backend.language

        def faulty_vision(pixels, *rest):
            if pixels.shape[:2] == (8, 8):
                raise RuntimeError("the vision graph is out of memory")
            image = vision(pixels, *rest)
            return image._replace(visual_embeds=np.full_like(image.visual_embeds, np.nan)) if pixels.shape[:2] == (1, 7) else image

        def faulty_language(**feed):
            if feed["budget"] == 49:
                raise EngineError("the language graph is out of memory")
            return language(**feed)

        backend.vision, backend.language = faulty_vision, faulty_language
"""
FAULTS = {
    (8, 8): "the request failed: RuntimeError: the vision graph is out of memory",
    (7, 7): "the language graph is out of memory",
    (1, 7): "not finite",
}


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def data_url(image: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


@pytest.fixture(scope="module")
def engine(build: Callable[..., Engine], random_checkpoint: Path) -> Engine:
    return build(random_checkpoint, DECODER_STAGES)


@pytest.fixture(scope="module")
def session(engine: Engine) -> Session:
    return Session(engine, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def model(engine: Engine) -> str:
    return repository_name(engine.model_name)


@pytest.fixture(scope="module")
def server(engine: Engine, slow_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    """The repository that build wrote, as it is; beside it one whose answers take long, one that gives them whole, and one that fails."""
    scratch = tmp_path_factory.mktemp("triton")
    write_model(scratch / "whole", "whole", Settings(str(engine.path), threads=1), stream=False)
    for name in ("faulty", "faulty-whole"):
        folder = write_model(scratch / "faulty", name, Settings(str(engine.path), slots=3, threads=1), stream=name == "faulty")
        (folder / "1" / "model.py").write_text(FAULTY)
    repositories = [engine.path / REPOSITORY_FOLDER, slow_engine.path / REPOSITORY_FOLDER, scratch / "whole", scratch / "faulty"]
    with TritonProcess(repositories, scratch) as process:
        yield process


def some_requests(count: int) -> list[tuple[str, list[np.ndarray], dict[str, Any]]]:
    """Prompts of several lengths with no, one or two images of several sizes, greedy and sampled, some at half the budget."""
    rng = np.random.default_rng(5)
    words = ["what", "color", "is", "the", "left", "object", "?"]
    requests = []
    for number in range(count):
        images = [picture(int(rng.integers(2, 6)), int(rng.integers(2, 6)), number) for _ in range(number % 3)]
        options: dict[str, Any] = {"max_new_tokens": int(rng.integers(1, 12))}
        if number % 4 == 1:
            options |= {"temperature": 0.7, "top_k": 20, "top_p": 0.95, "seed": number}
        if number % 5 == 2:
            options["keep_scale"] = 0.5
        requests.append((" ".join(words[: 1 + number % len(words)]), images, options))
    return requests


def alone(session: Session, prompt: Any, images: list[np.ndarray], options: dict[str, Any]) -> Any:
    """What the engine says without a server."""
    own = {name: value for name, value in options.items() if name in ("max_new_tokens", "keep_scale", "max_pixels")}
    sampling = SamplingParams(**{name: value for name, value in options.items() if name not in own})
    return session.generate(prompt, images, sampling=sampling, **own)


def assert_same(answer: Answer, expected: Any) -> None:
    assert answer.error is None
    assert answer.text == expected.text
    counts = {"prompt_tokens": expected.prompt_tokens, "new_tokens": len(expected.token_ids), "visual_tokens": expected.visual_tokens}
    kept = expected.stages[-1].kept
    assert {name: answer.outputs[name] for name in counts} == counts
    assert (answer.outputs["finish_reason"].decode(), answer.outputs["visual_tokens_kept"]) == (expected.finish_reason, kept)
    assert answer.outputs["ttft_s"] > answer.outputs["vision_s"] >= 0 and answer.outputs["prefill_s"] > 0


# -------------------------------------------------------------------------------------------------------- right answers


def test_the_server_shows_the_tensors_that_the_model_reads(server: TritonProcess, model: str) -> None:
    shown = triton_http.InferenceServerClient(f"127.0.0.1:{server.http_port}").get_model_config(model)
    for key, specs in (("input", INPUTS), ("output", OUTPUTS)):
        assert [(tensor["name"], tensor["data_type"], [int(size) for size in tensor["dims"]]) for tensor in shown[key]] == [
            (spec.name, f"TYPE_{spec.dtype}", list(spec.shape)) for spec in specs
        ]
    assert shown["model_transaction_policy"]["decoupled"]


def test_thirty_two_clients_at_once_get_the_answers_given_alone(server: TritonProcess, model: str, session: Session) -> None:
    requests = some_requests(32)
    barrier = threading.Barrier(len(requests))

    def client(request: tuple[str, list[np.ndarray], dict[str, Any]]) -> Answer:
        prompt, images, options = request
        inputs = tensors(prompt=prompt, **({"images": [png(image) for image in images]} if images else {}), **options)
        barrier.wait(PATIENCE)
        return server.ask(model, inputs)

    with ThreadPoolExecutor(len(requests)) as clients:
        answers = list(clients.map(client, requests))
    for answer, request in zip(answers, requests, strict=True):
        assert_same(answer, alone(session, *request))
    server.wait_for_gauge("requests_active", model, 0)


def test_answers_stream_piece_by_piece(server: TritonProcess, model: str, session: Session) -> None:
    image = picture(3, 4)
    answer = server.ask(model, tensors(prompt=QUESTION, images=[png(image)], max_new_tokens=9))
    assert answer.pieces[:-1] == list(session.stream(QUESTION, [image], max_new_tokens=9))
    assert len(answer.pieces) > 3 and answer.pieces[-1] == ""


def test_messages_and_pixels_are_another_form_of_prompt_and_images(server: TritonProcess, model: str, session: Session) -> None:
    images = [picture(3, 4, seed) for seed in range(2)]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the object ?"}]},
        {"role": "assistant", "content": "left"},
        {"role": "user", "content": [{"type": "text", "text": "or"}, {"type": "image"}]},
    ]
    answer = server.ask(model, tensors(messages=json.dumps(messages), pixels=np.stack(images), max_new_tokens=8))
    assert_same(answer, session.generate(messages, images, max_new_tokens=8))


def test_large_images_are_scaled_down_as_asked(server: TritonProcess, model: str, session: Session) -> None:
    image = picture(20, 30)
    answer = server.ask(model, tensors(prompt=QUESTION, images=[png(image)], max_pixels=1600, max_new_tokens=5))
    assert_same(answer, session.generate(QUESTION, [image], max_pixels=1600, max_new_tokens=5))


def test_http_generates_whole_and_streaming(server: TritonProcess, model: str, session: Session) -> None:
    image = picture(4, 3)
    expected = session.generate(QUESTION, [image], max_new_tokens=7)
    inputs = {"prompt": QUESTION, "images": [data_url(image)], "max_new_tokens": 7}
    status, whole = server.generate(model, stream=False, **inputs)
    assert (status, whole["text"], whole["visual_tokens"]) == (200, expected.text, 12)
    events = server.generate_stream(model, **inputs)
    assert "".join(event["text"] for event in events) == expected.text
    assert [("finish_reason" in event) for event in events] == [False] * (len(events) - 1) + [True]


def test_clients_that_call_infer_get_whole_answers_from_a_model_made_for_it(server: TritonProcess, model: str, session: Session) -> None:
    image = picture(4, 3)
    expected = session.generate(QUESTION, [image], max_new_tokens=7)
    for module, port in ((triton_http, server.http_port), (triton_grpc, server.grpc_port)):
        client = module.InferenceServerClient(f"127.0.0.1:{port}")
        inputs = tensors(module, prompt=QUESTION, images=[png(image)], max_new_tokens=7)
        result = client.infer("whole", inputs)
        assert result.as_numpy("text")[0].decode() == expected.text
        assert result.as_numpy("finish_reason")[0].decode() == expected.finish_reason
        with pytest.raises(InferenceServerException, match="decoupled transaction policy"):
            client.infer(model, inputs)
        with pytest.raises(InferenceServerException, match="input stream needs a model"):
            client.infer("whole", tensors(module, prompt=QUESTION, stream=True))


def test_an_answer_ends_before_a_stop_string_as_elsewhere(server: TritonProcess, model: str, session: Session) -> None:
    whole = session.generate(QUESTION, max_new_tokens=12)
    stop = whole.text[len(whole.text) // 2 :][:7]  # over the end of a word, so that a piece that was held back is cut
    expected = session.generate(QUESTION, max_new_tokens=12, stop=[stop, "never said"])
    assert expected.finish_reason == "stop" and expected.text == whole.text[: whole.text.index(stop)] != ""
    answer = server.ask(model, tensors(prompt=QUESTION, stop=["never said", stop], max_new_tokens=12))
    assert_same(answer, expected)
    assert answer.pieces[:-1] == list(session.stream(QUESTION, max_new_tokens=12, stop=[stop]))
    for value in (stop, [stop]):
        status, body = server.generate(model, prompt=QUESTION, stop=value, max_new_tokens=12, stream=False)
        assert (status, body["text"], body["finish_reason"], body["new_tokens"]) == (200, expected.text, "stop", len(expected.token_ids))
    assert_same(server.ask(model, tensors(prompt=QUESTION, stop=["never said"], max_new_tokens=12)), whole)
    server.wait_for_gauge("requests_active", model, 0)


# -------------------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "give one of the inputs prompt and messages"),
        ({"prompt": "a", "messages": "[]"}, "give one of the inputs prompt and messages"),
        ({"prompt": b"\xff\xfe"}, "input prompt must be UTF-8 text"),
        ({"prompt": "a" * (1 << 20) + "a"}, "input prompt has 1,048,577 bytes; at most 1,048,576 are taken"),
        ({"prompt": "a " * 400}, "prompt has"),
        ({"prompt": "<|im_end|>"}, "structures prompts"),
        ({"messages": "[" * 100_000}, "input messages must be JSON"),
        ({"messages": '"a"'}, "input messages must be a JSON list"),
        ({"messages": "[]"}, "at least one message"),
        ({"messages": '[{"role": "root", "content": "a"}]'}, "unknown role 'root'"),
        ({"messages": '[{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]'}, 'must be {"type": "image"} alone'),
        ({"prompt": "a", "images": ["/etc/hostname"]}, "not an image"),
        ({"prompt": "a", "images": [b""]}, "not an image"),
        ({"prompt": "a", "images": [png(picture(4, 4))[:100]]}, "damaged image"),
        ({"prompt": "a", "images": ["data:image/png;base64,@@@"]}, "images[0]: not base64"),
        ({"prompt": "a", "images": ["data:image/png,abc"]}, "images[0]: a data URL must be data:image/...;base64,..."),
        ({"prompt": "a", "images": [png(picture(8, 8)), png(picture(8, 8))]}, "max_visual_tokens 64 built, images have 128"),
        ({"prompt": "a", "pixels": np.zeros((0, 8, 8, 3))}, "input pixels must be uint8"),
        ({"prompt": "a", "pixels": np.zeros((1, 8, 8, 3)), "images": [b"x"]}, "give one of the inputs images and pixels"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"prompt": "a", "max_new_tokens": 2**62}, "max_new_tokens 4611686018427387904 is more than"),
        ({"prompt": "a", "temperature": -1.0}, "temperature must be"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature must be"),
        ({"prompt": "a", "top_p": 0.0}, "top_p must be"),
        ({"prompt": "a", "top_k": -1}, "top_k must be"),
        ({"prompt": "a", "seed": -1}, "seed must be"),
        ({"prompt": "a", "stop": list("abcde")}, "input stop has 5 strings; at most 4 are taken"),
        ({"prompt": "a", "stop": ["a", ""]}, "stop[1] has 0 characters; it must have 1 to 1,000"),
        ({"prompt": "a", "stop": ["a" * 1001]}, "stop[0] has 1,001 characters; it must have 1 to 1,000"),
        ({"prompt": "a", "stop": [b"\xff"]}, "stop[0] must be UTF-8 text"),
        ({"prompt": "a", "keep_scale": 1.5}, "keep_scale must be in (0, 1]"),
        ({"prompt": "a", "max_pixels": 1}, "max_pixels must be at least"),
        ({"prompt": "a", "timeout": 0.0}, "timeout must be more than 0"),
        ({"prompt": "a", "timeout": float("nan")}, "timeout must be more than 0"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_with_one_line(server: TritonProcess, model: str, inputs: dict[str, Any], message: str) -> None:
    answer = server.ask(model, tensors(**inputs))
    assert answer.error is not None and message in answer.error and "\n" not in answer.error
    assert answer.pieces == []


def test_an_image_bomb_is_refused(server: TritonProcess, model: str) -> None:
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "png")
    answer = server.ask(model, tensors(prompt="a", images=[bomb.getvalue()]))
    assert answer.error is not None and "decompression bomb" in answer.error


def test_tensors_of_other_types_and_shapes_are_refused(server: TritonProcess, model: str) -> None:
    for array, dtype in ((np.zeros(1, np.int32), "INT32"), (np.zeros(2, np.int64), "INT64"), (np.zeros((1, 1), np.int64), "INT64")):
        tensor = triton_grpc.InferInput("max_new_tokens", array.shape, dtype)
        tensor.set_data_from_numpy(array)
        assert server.ask(model, [*tensors(prompt="a"), tensor]).error
    unknown = triton_grpc.InferInput("nothing", [1], "INT64")
    unknown.set_data_from_numpy(np.zeros(1, np.int64))
    assert "unexpected inference input 'nothing'" in str(server.ask(model, [*tensors(prompt="a"), unknown]).error)


WHOLE_NUMBERS = st.integers(-(2**63), 2**63 - 1)
ANYTHING = {
    "prompt": st.binary(max_size=60) | st.text(max_size=60),
    "messages": st.binary(max_size=60) | st.recursive(st.none() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=3)).map(json.dumps),
    "images": st.lists(st.binary(max_size=80) | st.just(png(picture(2, 2))) | st.text(max_size=20).map("data:".__add__), max_size=3),
    "max_new_tokens": WHOLE_NUMBERS | st.integers(0, 5),
    "temperature": st.floats() | st.just(1.0),
    "top_k": WHOLE_NUMBERS | st.just(3),
    "top_p": st.floats() | st.just(0.5),
    "seed": WHOLE_NUMBERS,
    "stop": st.lists(st.binary(max_size=20) | st.text(max_size=20) | st.integers(999, 1001).map("a".__mul__), max_size=6),
    "keep_scale": st.floats() | st.floats(0, 1),
    "max_pixels": WHOLE_NUMBERS,
    "timeout": st.floats(),
    "stream": st.booleans(),
}  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(inputs=st.fixed_dictionaries({}, optional=ANYTHING))
def test_whatever_is_asked_is_answered_or_refused(server: TritonProcess, model: str, inputs: dict[str, Any]) -> None:
    answer = server.ask(model, tensors(**inputs))
    assert (answer.error is None) == bool(answer.outputs)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=100) | st.dictionaries(st.sampled_from(sorted(ANYTHING)), st.none() | st.integers() | st.text() | st.lists(st.text()))
       .map(lambda body: json.dumps(body).encode()))  # fmt: skip
def test_whatever_is_posted_is_answered_or_refused(server: TritonProcess, model: str, body: bytes) -> None:
    status, _ = server.get(server.http_port, f"/v2/models/{model}/generate_stream", body)
    assert status in (200, 400, 500, 503)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([spec.name for spec in INPUTS]),
    dtype=st.sampled_from(["BYTES", "INT64", "FP64", "UINT8", "BOOL", "FP16", "", "x"]),
    shape=st.lists(st.integers(-1, 4) | st.just(2**40), max_size=4),
    raw=st.binary(max_size=40),
)
@example("prompt", "BYTES", [1], b"")
@example("prompt", "BYTES", [1], b"\x09\0\0\0short")
@example("prompt", "BYTES", [1], b"\xff\xff\xff\xff")
@example("prompt", "BYTES", [1], b"\x01\0\0\0a\x01\0\0\0b")
@example("images", "BYTES", [2], b"\x01\0\0\0a")
@example("images", "BYTES", [2**40], b"\0\0\0\0")
@example("pixels", "UINT8", [1, 2, 2, 3], b"\0" * 11)
@example("pixels", "UINT8", [2**40, 2**40, 1, 3], b"\0" * 3)
@example("seed", "INT64", [1], b"\0")
def test_raw_tensors_that_contradict_themselves_are_refused(
    server: TritonProcess, model: str, name: str, dtype: str, shape: list[int], raw: bytes
) -> None:
    import grpc

    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[raw])
    request.inputs.add(name=name, datatype=dtype, shape=shape)
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        for response in service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request]), timeout=PATIENCE):
            assert response.error_message or name in ("prompt", "messages")


def test_after_all_that_nothing_is_lost_and_answers_are_right(server: TritonProcess, model: str, session: Session) -> None:
    server.wait_for_gauge("requests_active", model, 0)
    assert server.gauge("requests_queued", model) == 0
    for request in some_requests(6):
        prompt, images, options = request
        inputs = {"images": [png(image) for image in images]} if images else {}
        assert_same(server.ask(model, tensors(prompt=prompt, **inputs, **options)), alone(session, *request))


# ------------------------------------------------------------------------------------------------------ slots that fail


def test_a_request_that_fails_in_its_slot_takes_nobody_along(server: TritonProcess, session: Session) -> None:
    failing = [(QUESTION, [picture(*size, number)], {"max_new_tokens": 9}) for number in range(4) for size in FAULTS]  # four a slot
    requests = [request for pair in zip(failing, some_requests(len(failing)), strict=True) for request in pair]
    barrier = threading.Barrier(len(requests))

    def client(request: tuple[str, list[np.ndarray], dict[str, Any]]) -> Answer:
        prompt, images, options = request
        inputs = tensors(prompt=prompt, **({"images": [png(image) for image in images]} if images else {}), **options)
        barrier.wait(PATIENCE)
        return server.ask("faulty", inputs)

    with ThreadPoolExecutor(len(requests)) as clients:
        answers = list(clients.map(client, requests))
    for answer, message in zip(answers[::2], list(FAULTS.values()) * 4, strict=True):
        assert answer.error is not None and message in answer.error and "\n" not in answer.error
        assert answer.pieces == [] and answer.outputs == {}
    for answer, request in zip(answers[1::2], requests[1::2], strict=True):
        assert_same(answer, alone(session, *request))
    server.wait_for_gauge("requests_active", "faulty", 0)
    assert (server.gauge("requests_queued", "faulty"), server.gauge("slots", "faulty")) == (0, 3)
    expected = alone(session, *requests[1])
    with ThreadPoolExecutor(3) as clients:  # in every slot, after what has failed there
        for answer in clients.map(lambda _: server.ask("faulty", tensors(prompt=requests[1][0], **requests[1][2])), range(3)):
            assert_same(answer, expected)


def test_a_failure_of_the_runtime_is_the_servers_and_a_bad_request_the_clients(server: TritonProcess) -> None:
    requests = [(png(picture(*size)), "INTERNAL", message) for size, message in FAULTS.items()] + [(b"x", "INVALID_ARGUMENT", "not an image")]
    for image, code, message in requests:
        with pytest.raises(InferenceServerException, match=message) as caught:
            triton_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}").infer("faulty-whole", tensors(prompt=QUESTION, images=[image]))
        assert caught.value.status() == f"StatusCode.{code}"
        status, body = server.generate("faulty", prompt=QUESTION, images=["data:;base64," + base64.b64encode(image).decode()], stream=False)
        assert message in body["error"]
        assert status == 400, "what Triton makes of every code there; if this fails, docs/triton.md need not say so any more"


def test_requests_that_fail_leave_no_memory_no_threads_and_no_files_behind(server: TritonProcess) -> None:
    (process,) = [child for child in server.children() if b"/faulty/1/" in Path(f"/proc/{child}/cmdline").read_bytes()]
    large = tensors(prompt=QUESTION, pixels=np.stack([picture(125, 125)]))  # 3 MB, and scaled down to 8 × 8 visual tokens

    def held() -> tuple[int, int, int]:
        """Bytes, threads and open files."""
        server.wait_for_gauge("requests_active", "faulty", 0)
        status = Path(f"/proc/{process}/status").read_text()
        resident, threads = (int(re.findall(rf"{name}:\s+(\d+)", status)[0]) for name in ("VmRSS", "Threads"))
        return resident * 1024, threads, len(list(Path(f"/proc/{process}/fd").iterdir()))

    def fail(times: int) -> None:
        for _ in range(times):
            assert FAULTS[8, 8] in str(server.ask("faulty", large).error)

    fail(20)
    before = held()
    fail(60)
    after = held()
    assert after[0] - before[0] < 30 * 3_000_000, "half of the images that were sent"
    assert after[1] <= before[1] and after[2] <= before[2]


# --------------------------------------------------------------------------------------------- clients that go


def test_a_client_that_goes_frees_its_slot(server: TritonProcess) -> None:
    with server.stream("slow", tensors(prompt=ENDLESS, max_new_tokens=SLOW_TOKENS - 100)) as responses:
        next(responses)
        server.wait_for_gauge("requests_active", "slow", 1)
    server.wait_for_gauge("requests_active", "slow", 0)
    assert server.ask("slow", tensors(prompt="hello", max_new_tokens=2)).error is None


def test_an_http_client_that_goes_frees_its_slot(server: TritonProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=PATIENCE)
    body = json.dumps({"prompt": ENDLESS, "max_new_tokens": SLOW_TOKENS - 100})
    connection.request("POST", "/v2/models/slow/generate_stream", body)
    connection.getresponse().read(10)
    server.wait_for_gauge("requests_active", "slow", 1)
    connection.close()
    server.wait_for_gauge("requests_active", "slow", 0)


def test_a_client_that_goes_while_it_waits_leaves_the_queue(server: TritonProcess) -> None:
    long = tensors(prompt=ENDLESS, max_new_tokens=SLOW_TOKENS - 100)
    with server.stream("slow", long) as responses:
        next(responses)
        with server.stream("slow", long):
            server.wait_for_gauge("requests_queued", "slow", 1)
            full = server.ask("slow", tensors(prompt="hello"))
            assert full.error == "1 requests are waiting already; try again later"
        server.wait_for_gauge("requests_queued", "slow", 0)
        next(responses)
    server.wait_for_gauge("requests_active", "slow", 0)


def test_a_request_whose_time_is_over_says_so(server: TritonProcess) -> None:
    answer = server.ask("slow", tensors(prompt=ENDLESS, max_new_tokens=SLOW_TOKENS - 100, timeout=0.3))
    assert answer.error is not None and "not answered within 0.3 s" in answer.error and answer.pieces
    server.wait_for_gauge("requests_active", "slow", 0)
