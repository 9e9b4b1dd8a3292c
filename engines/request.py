"""A request up to the language graph: what needs neither caches nor other requests, so that sessions and batchers share every line of it.

:func:`read_request` is work of the host (tokens, images, refusals) and may run in any thread; :func:`prepare_request` runs the vision graph.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..exporter.schedule import keep_count
from .backends.base import Backend, EmbeddedImage, VisionBackend
from .errors import EngineError
from .manifest import Engine, Segment
from .positions import ImageSurvivors, prompt_positions
from .preprocess import ImagePatches, ImageProcessorConfig, load_image, preprocess_image
from .prompt import Prompt, PromptEncoder, expand_image_tokens
from .results import Prepared, Step
from .sampling import SamplingParams, is_number, is_whole

__all__ = [
    "DEFAULT_MAX_NEW_TOKENS",
    "ImageSource",
    "Request",
    "answer_room",
    "prepare_request",
    "prompt_lengths",
    "read_request",
    "run_language",
]

ROUNDING = 1e-9  # of a product: 100 · 0.07 is a little more than 7
DEFAULT_MAX_NEW_TOKENS = 256  # where the request does not say; fewer if the engine has no room

ImageSource = str | Path | bytes | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True)
class Request:
    """A request that an engine can answer.

    Attributes:
        token_ids: the prompt, with one image token an image.
        patches: of each image; grids: its rows and columns in visual tokens; budgets: visual tokens from which ratios are counted.
        max_new_tokens: for which there is room.
        sampling: how tokens are chosen; stop: texts before the first of which the answer ends.
        read_seconds: what reading the images took.
    """

    token_ids: tuple[int, ...]
    patches: tuple[ImagePatches, ...]
    grids: tuple[tuple[int, int], ...]
    budgets: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    read_seconds: float


def read_request(
    engine: Engine,
    encoder: PromptEncoder,
    prompt: Prompt,
    images: Sequence[ImageSource] = (),
    *,
    max_new_tokens: int | None = None,
    sampling: SamplingParams | None = None,
    stop: Sequence[str] = (),
    keep_scale: float = 1.0,
    max_pixels: int | None = None,
    dtype: type[np.floating[Any]] = np.float32,
) -> Request:
    """Encode the prompt, read and cut up the images, and refuse what the engine has no room for. Arguments as :meth:`Session.stream`.

    ``dtype`` is the backend's: for float16 pixel values are made so at once, for every other in float32.

    Raises:
        EngineError: a request that the engine cannot take; the message says what to change.
    """
    if max_new_tokens is not None and not (is_whole(max_new_tokens) and max_new_tokens >= 1):
        raise EngineError(f"max_new_tokens must be a whole number of at least 1, got {max_new_tokens!r}")
    if not is_number(keep_scale) or not 0 < keep_scale <= 1:
        raise EngineError(f"keep_scale must be in (0, 1], got {keep_scale!r}")
    stops = tuple(stop)
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stops):
        raise EngineError("stop must be a list of strings, none of them empty")
    if not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
        raise EngineError(f"images must be a list of images, got {type(images).__name__}; put a single one into a list")
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise EngineError(f"sampling must be SamplingParams, got {type(sampling).__name__}")
    processor = _image_processor(engine, max_pixels)
    token_ids = encoder.encode(prompt, len(images))
    began = time.perf_counter()
    pixels = np.float16 if dtype is np.float16 else np.float32
    wanted = "entropy" in engine.vision.input_names
    patches = [preprocess_image(load_image(image), processor, dtype=pixels, entropy=wanted) for image in images]
    read_seconds = time.perf_counter() - began
    merge_size = engine.shape.tower.merge_size
    grids = [(patch.grid_thw[1] // merge_size, patch.grid_thw[2] // merge_size) for patch in patches]
    _check_visual_tokens(engine, [rows * columns for rows, columns in grids])
    budgets = [max(1, math.ceil(rows * columns * keep_scale - ROUNDING)) for rows, columns in grids]
    room = answer_room(
        engine,
        text_tokens=len(token_ids) - len(images),
        visual_tokens=sum(_survivors(engine, rows * columns, budget) for (rows, columns), budget in zip(grids, budgets, strict=True)),
        budget=sum(budgets),
        new_tokens=max_new_tokens or 1,
    )
    return Request(
        token_ids=tuple(token_ids),
        patches=tuple(patches),
        grids=tuple(grids),
        budgets=tuple(budgets),
        max_new_tokens=max_new_tokens or min(DEFAULT_MAX_NEW_TOKENS, room),
        sampling=sampling or SamplingParams(),
        stop=stops,
        read_seconds=read_seconds,
    )


def prepare_request(engine: Engine, backend: VisionBackend, request: Request) -> Prepared:
    """Run the vision graph on each image, and lay out tokens and positions. No cache is touched.

    Raises:
        EngineError: the backend failed.
    """
    tower = engine.shape.tower
    began = time.perf_counter()
    none = np.zeros(0, np.float32)
    embedded, survivors = [EmbeddedImage(np.zeros((0, engine.shape.visual_width), backend.dtype), none, np.zeros(0, np.int64))], []
    for patches, (rows, columns), budget in zip(request.patches, request.grids, request.budgets, strict=True):
        entropy = patches.entropy.reshape(rows, columns, tower.group) if patches.entropy.size else patches.entropy
        image = backend.vision(patches.pixel_values.reshape(rows, columns, tower.group, tower.patch_dim), entropy, budget)
        embedded.append(image)
        survivors.append(ImageSurvivors(rows, columns, image.index))
    vision_seconds = request.read_seconds + time.perf_counter() - began

    image_token = engine.tokens.image
    input_ids, visual_positions = expand_image_tokens(request.token_ids, [image.index.size for image in survivors], image_token=image_token)
    position_ids, next_position = prompt_positions(
        input_ids, survivors, image_token=image_token, renumber_first_stage=engine.schedule.renumber_first_stage
    )
    return Prepared(
        input_ids=input_ids,
        position_ids=position_ids,
        next_position=next_position,
        visual_embeds=np.concatenate([image.visual_embeds for image in embedded]),
        importance=np.concatenate([image.importance for image in embedded]),
        key_bias=np.concatenate([none if image.key_bias is None else image.key_bias for image in embedded]),
        visual_positions=visual_positions,
        survivors=tuple(survivors),
        visual_tokens=sum(rows * columns for rows, columns in request.grids),
        budgets=request.budgets,
        vision_seconds=vision_seconds,
    )


def run_language(backend: Backend, prepared: Prepared, past_lengths: NDArray[np.int64], slot: int = 0) -> Step:
    """Append the tokens of one request to a slot's caches, which hold ``past_lengths`` int64 [segments] tokens.

    Raises:
        EngineError: the backend failed.
    """
    logits, last_hidden = backend.language(
        input_ids=prepared.input_ids[None],  # [1, S]
        position_ids=prepared.position_ids[:, None],  # [3, 1, S]
        visual_embeds=prepared.visual_embeds,
        visual_positions=prepared.visual_positions,
        importance=prepared.importance,
        key_bias=prepared.key_bias,
        budget=prepared.budget,
        past_lengths=past_lengths[None],  # [1, segments]
        slot=slot,
    )
    return Step(logits[0], last_hidden[0])


def prompt_lengths(segments: Sequence[Segment], *, text_tokens: int, visual_tokens: int, budget: int) -> NDArray[np.int64]:
    """Tokens of a prompt in each segment's caches: int64 [segments].

    ``visual_tokens`` enter the decoder; later segments count theirs from ``budget``, the original visual tokens of all images.
    """
    later = [keep_count(budget, segment.keep) for segment in segments[1:]]
    return np.array([visual_tokens, *later], np.int64) + text_tokens


def answer_room(engine: Engine, *, text_tokens: int, visual_tokens: int, budget: int, new_tokens: int = 1) -> int:
    """How long an answer to a prompt may be; its last token never enters the caches. Arguments as :func:`prompt_lengths`.

    Raises:
        EngineError: the prompt does not fit, or not with ``new_tokens`` tokens of answer.
    """
    lengths = prompt_lengths(engine.segments, text_tokens=text_tokens, visual_tokens=visual_tokens, budget=budget)
    room = min(segment.capacity - int(length) for segment, length in zip(engine.segments, lengths, strict=True))
    built = engine.limits.max_text_tokens
    if room < 0:
        raise EngineError(
            f"prompt has {text_tokens} text tokens, the engine was built for {built}; shorten it, or build with a larger --max-text-tokens"
        )
    if new_tokens > room + 1:
        raise EngineError(
            f"max_new_tokens {new_tokens} is more than the {room + 1} for which there is room after this prompt "
            f"(max_text_tokens {built} built); ask for fewer, or build with a larger --max-text-tokens"
        )
    return room + 1


def _survivors(engine: Engine, tokens: int, budget: int) -> int:
    """Visual tokens of an image that the vision graph leaves; all of them if nothing in it drops any, whatever the budget."""
    return keep_count(budget, engine.segments[0].keep) if "budget_tokens" in engine.vision.input_names else tokens


def _image_processor(engine: Engine, max_pixels: int | None) -> ImageProcessorConfig:
    config = engine.image_processor
    if max_pixels is None:
        return config
    if not is_whole(max_pixels) or max_pixels < config.min_pixels:
        raise EngineError(f"max_pixels must be at least {config.min_pixels} (the checkpoint's min_pixels) and a whole number, got {max_pixels!r}")
    return replace(config, max_pixels=max_pixels)


def _check_visual_tokens(engine: Engine, counts: Sequence[int]) -> None:
    built = engine.limits.max_visual_tokens
    if sum(counts) > built:
        what = f"image has {counts[0]}" if len(counts) == 1 else f"images have {sum(counts)} together"
        raise EngineError(f"max_visual_tokens {built} built, {what}; resize (max_pixels) or crop, or rebuild with --max-visual-tokens")
