"""The Triton server model without a server: its parameters, and the tensors of a request."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vflow.engines import EngineError, SamplingParams
from vflow.engines.data_url import unpack_data_url
from vflow.engines.triton_server.inputs import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, read_inputs
from vflow.engines.triton_server.settings import Settings


def strings(*values: bytes) -> np.ndarray:
    return np.array(values, np.object_)


def parameters(**values: str) -> dict[str, Any]:
    """A configuration as Triton passes it to a model."""
    return {"parameters": {name: {"string_value": value} for name, value in values.items()}}


def test_settings_are_read_as_they_are_written() -> None:
    for settings in (Settings("../.."), Settings("/e", 3, None, 0, "cpu", 2, 1.5), Settings("x", kv_memory=10**12, drain=0.0)):
        assert Settings.from_config(parameters(**settings.to_parameters())) == settings


def test_the_engine_is_found_from_the_models_folder_or_by_its_own_path(tmp_path: Path) -> None:
    assert Settings("../..").engine_path(tmp_path / "engine" / "triton" / "m") == (tmp_path / "engine").resolve()
    assert Settings(str(tmp_path)).engine_path("/elsewhere/m") == tmp_path.resolve()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "parameter engine is missing"),
        ({"engine": ""}, "parameter engine is missing"),
        ({"engine": "e", "slot": "1"}, "parameter slot is not known"),
        ({"engine": "e", "slots": "many"}, "parameter slots must be a whole number"),
        ({"engine": "e", "slots": "1.5"}, "parameter slots must be a whole number"),
        ({"engine": "e", "queue_limit": "-1"}, "parameter queue_limit must be"),
        ({"engine": "e", "drain": "inf"}, "parameter drain must be a number"),
        ({"engine": "e", "drain": "nan"}, "parameter drain must be a number"),
    ],
)
def test_parameters_that_cannot_be_meant_are_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Settings.from_config(parameters(**values))


def test_tensors_become_a_request() -> None:
    tensors = {
        "prompt": strings(b"gr\xc3\xbc\xc3\x9fe"),
        "images": strings(b"\x89PNG", b"data:image/png;base64," + base64.b64encode(b"\xff\xd8")),
        "max_new_tokens": np.array([5]),
        "temperature": np.array([0.7]),
        "seed": np.array([9]),
        "stop": strings("ß".encode(), b"\n\n"),
        "keep_scale": np.array([0.5]),
        "stream": np.array([False]),
    }
    request = read_inputs(tensors)
    assert (request.prompt, request.images) == ("grüße", (b"\x89PNG", b"\xff\xd8"))
    assert (request.max_new_tokens, request.keep_scale, request.max_pixels, request.timeout, request.stream) == (5, 0.5, None, None, False)
    assert request.sampling == SamplingParams(temperature=0.7, seed=9) and request.stop == ("ß", "\n\n")
    assert type(request.max_new_tokens) is int and type(request.keep_scale) is float


def test_stop_strings_as_long_as_may_be_are_taken_and_none_is_none() -> None:
    most = strings(*["ß".encode() * 1000] * 4)
    assert read_inputs({"prompt": strings(b"a"), "stop": most}).stop == ("ß" * 1000,) * 4
    assert read_inputs({"prompt": strings(b"a"), "stop": strings()}).stop == read_inputs({"prompt": strings(b"a")}).stop == ()


def test_pixels_outlive_the_memory_that_is_shared_with_the_server() -> None:
    pixels = np.ones((2, 4, 5, 3), np.uint8)
    request = read_inputs({"prompt": strings(b"a"), "pixels": pixels})
    pixels[:] = 0
    assert [image.shape for image in request.images] == [(4, 5, 3)] * 2 and all(image.all() for image in request.images)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompt": strings(b"a", b"b")}, r"input prompt must have one element, got shape \[2\]"),
        ({"prompt": strings(b"a"), "seed": np.zeros((0,), np.int64)}, "input seed must have one element"),
        ({"prompt": strings(b"a"), "images": strings(b"x" * (MAX_IMAGE_BYTES + 1))}, r"images\[0\] has 33,554,433 bytes"),
        ({"prompt": strings(b"a"), "images": strings(b"x", b"data:;base64")}, r"images\[1\]: a data URL must be"),
        ({"messages": strings(b'{"role": "user"}')}, "must be a JSON list"),
        ({"prompt": strings(b"a"), "stop": strings(*[b"a"] * 5)}, "input stop has 5 strings; at most 4 are taken"),
        ({"prompt": strings(b"a"), "stop": strings(b"a", b"")}, r"stop\[1\] has 0 characters; it must have 1 to 1,000"),
        ({"prompt": strings(b"a"), "stop": strings("ß".encode() * 1001)}, r"stop\[0\] has 1,001 characters"),
        ({"prompt": strings(b"a"), "stop": strings(b"a" * (MAX_TEXT_BYTES + 1))}, r"stop\[0\] has 1,048,577 bytes"),
        ({"prompt": strings(b"a"), "stop": strings(b"\xff")}, r"stop\[0\] must be UTF-8 text"),
    ],
)
def test_tensors_that_cannot_be_meant_are_refused(tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        read_inputs(tensors)


def test_percent_escapes_of_a_data_url_are_taken() -> None:
    assert unpack_data_url(b"data:image/png;base64,%2B%2F8%3D", "image") == base64.b64decode("+/8=")
