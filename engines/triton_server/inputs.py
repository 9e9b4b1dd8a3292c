"""The tensors of one request, read and checked: nothing is taken as it came."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data_url import DATA_URL, unpack_data_url
from ..errors import EngineError
from ..prompt import Prompt
from ..request import ImageSource
from ..sampling import SamplingParams
from ..text_stream import MAX_STOP_CHARACTERS, MAX_STOPS

__all__ = ["MAX_IMAGE_BYTES", "MAX_TEXT_BYTES", "ServerRequest", "read_inputs"]

MAX_TEXT_BYTES = 1 << 20  # of one string, before anything is made of it
MAX_IMAGE_BYTES = 32 << 20  # a camera's largest JPEG; what it may unpack to is bounded when it is read


@dataclass(frozen=True)
class ServerRequest:
    """A request as :meth:`vflow.engines.Batcher.submit` takes it.

    Attributes:
        stream: whether the answer is to come piece by piece; None leaves it to the model's transaction policy.
    """

    prompt: Prompt
    images: tuple[ImageSource, ...]
    max_new_tokens: int | None
    sampling: SamplingParams
    stop: tuple[str, ...]
    keep_scale: float
    max_pixels: int | None
    timeout: float | None
    stream: bool | None


def read_inputs(tensors: Mapping[str, NDArray[Any]]) -> ServerRequest:
    """Read the tensors of a request, by name; dtypes and shapes are those of ``interface.INPUTS``, which Triton has checked.

    Raises:
        EngineError: says which input, and what it must be.
    """
    sampling = {name: value for name in (field.name for field in fields(SamplingParams)) if (value := _scalar(tensors, name)) is not None}
    keep_scale = _scalar(tensors, "keep_scale")
    return ServerRequest(
        prompt=_prompt(tensors),
        images=_images(tensors),
        max_new_tokens=_scalar(tensors, "max_new_tokens"),
        sampling=SamplingParams(**sampling),
        stop=_stop(tensors),
        keep_scale=1.0 if keep_scale is None else keep_scale,
        max_pixels=_scalar(tensors, "max_pixels"),
        timeout=_scalar(tensors, "timeout"),
        stream=_scalar(tensors, "stream"),
    )


def _scalar(tensors: Mapping[str, NDArray[Any]], name: str) -> Any:
    """The one element of a tensor as Python's own type; None where the request does not have it."""
    if name not in tensors:
        return None
    if tensors[name].size != 1:
        raise EngineError(f"input {name} must have one element, got shape {list(tensors[name].shape)}")
    return tensors[name].reshape(-1)[0].item() if tensors[name].dtype != object else tensors[name].reshape(-1)[0]


def _text(tensors: Mapping[str, NDArray[Any]], name: str) -> str | None:
    value: bytes | None = _scalar(tensors, name)
    return None if value is None else _decoded(value, f"input {name}")


def _decoded(value: bytes, where: str) -> str:
    if len(value) > MAX_TEXT_BYTES:
        raise EngineError(f"{where} has {len(value):,} bytes; at most {MAX_TEXT_BYTES:,} are taken")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise EngineError(f"{where} must be UTF-8 text") from None


def _stop(tensors: Mapping[str, NDArray[Any]]) -> tuple[str, ...]:
    values = tensors.get("stop", np.empty(0, np.object_)).reshape(-1)
    if values.size > MAX_STOPS:  # before any is looked at
        raise EngineError(f"input stop has {values.size:,} strings; at most {MAX_STOPS} are taken")
    stops = tuple(_decoded(value, f"stop[{number}]") for number, value in enumerate(values))
    for number, stop in enumerate(stops):
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise EngineError(f"stop[{number}] has {len(stop):,} characters; it must have 1 to {MAX_STOP_CHARACTERS:,}")
    return stops


def _prompt(tensors: Mapping[str, NDArray[Any]]) -> Prompt:
    prompt, messages = _text(tensors, "prompt"), _text(tensors, "messages")
    if prompt is not None and messages is None:
        return prompt
    if messages is None or prompt is not None:
        raise EngineError("give one of the inputs prompt and messages")
    try:
        parsed = json.loads(messages)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"input messages must be JSON ({error})") from None
    if not isinstance(parsed, list):  # a string would be taken for a prompt
        raise EngineError("input messages must be a JSON list of messages")
    return parsed


def _images(tensors: Mapping[str, NDArray[Any]]) -> tuple[ImageSource, ...]:
    if "pixels" not in tensors:
        return tuple(_image_bytes(data, number) for number, data in enumerate(tensors.get("images", np.empty(0)).reshape(-1)))
    if "images" in tensors:
        raise EngineError("give one of the inputs images and pixels")
    pixels = tensors["pixels"]
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise EngineError(f"input pixels must be uint8 [images, height, width, 3], none of them 0, got {pixels.dtype} {list(pixels.shape)}")
    return tuple(pixels.copy())  # out of the memory that is shared with the server


def _image_bytes(data: bytes, number: int) -> bytes:
    """An encoded image; a data URL is unpacked."""
    if data.startswith(DATA_URL):
        data = unpack_data_url(data, f"images[{number}]")
    if len(data) > MAX_IMAGE_BYTES:
        raise EngineError(f"images[{number}] has {len(data):,} bytes; at most {MAX_IMAGE_BYTES:,} are taken")
    return data
