"""What goes into the language graph and what comes out of a session, as data; and the sizes that a report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..exporter.schedule import keep_count
from .manifest import Engine
from .positions import ImageSurvivors

__all__ = ["GenerationResult", "KvBytes", "Prepared", "StageCount", "Step", "held_bytes", "kv_bytes", "slot_bytes", "stage_counts", "token_bytes"]


def stage_counts(engine: Engine, budgets: Sequence[int]) -> tuple[StageCount, ...]:
    """Survivors of each stage, over all images: stages up to decoder 0 count image by image, later ones all images together."""
    counts = []
    for stage in engine.schedule.stages:
        together = stage.part == "decoder" and stage.layer > 0
        kept = keep_count(sum(budgets), stage.keep) if together else sum(keep_count(budget, stage.keep) for budget in budgets)
        counts.append(StageCount(stage.part, stage.layer, kept))
    return tuple(counts)


def kv_bytes(engine: Engine, allocated: int) -> KvBytes:
    """Sizes of the KV caches of one request whose buffers have ``allocated`` bytes."""
    visual = held_bytes(engine, [segment.visual_capacity for segment in engine.segments])
    return KvBytes(allocated, visual, engine.shape.decoder.layers * engine.limits.max_visual_tokens * token_bytes(engine))


def slot_bytes(engine: Engine) -> int:
    """Bytes of the KV caches that one request takes, whatever it asks."""
    return held_bytes(engine, [segment.capacity for segment in engine.segments])


def token_bytes(engine: Engine) -> int:
    """Key and value of one token in one layer."""
    decoder = engine.shape.decoder
    return 2 * decoder.kv_heads * decoder.head_dim * engine.itemsize


def held_bytes(engine: Engine, tokens: Sequence[int]) -> int:
    """What the caches hold of so many tokens in each segment: key and value a layer, and once what is added to attention scores of a token."""
    added = engine.itemsize if engine.schedule.proportional_attention else 0
    return sum(count * (segment.layers * token_bytes(engine) + added) for segment, count in zip(engine.segments, tokens, strict=True))


class Step(NamedTuple):
    """What the language graph says about the last token: ``logits`` float32 [vocab_size], ``last_hidden`` T [hidden_size]."""

    logits: NDArray[np.float32]
    last_hidden: NDArray[Any]


@dataclass(frozen=True)
class StageCount:
    """Visual tokens of a request that a stage has kept."""

    part: str
    layer: int
    kept: int


@dataclass(frozen=True)
class KvBytes:
    """Bytes of the KV caches: all that is allocated, its visual part, and that part without pruning."""

    allocated: int
    visual: int
    visual_unpruned: int


@dataclass(frozen=True)
class Prepared:
    """A request up to the language graph.

    Attributes:
        input_ids: int64 [S], survivors written as image tokens.
        position_ids: int64 [3, S].
        next_position: position of the first token of the answer.
        visual_embeds: T [V, hidden_size], importance: float32 [V], visual_positions: int64 [V].
        key_bias: float32 [V], what the decoder adds to its attention scores of each; empty where the schedule has no proportional attention.
        survivors: grid and surviving indices of each image.
        visual_tokens: original visual tokens of all images.
        budgets: visual tokens from which ratios are counted, of each image (fewer than it has with a smaller budget).
        vision_seconds: preprocessing and vision graph.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    next_position: int
    visual_embeds: NDArray[Any]
    importance: NDArray[np.float32]
    key_bias: NDArray[np.float32]
    visual_positions: NDArray[np.int64]
    survivors: tuple[ImageSurvivors, ...]
    visual_tokens: int
    budgets: tuple[int, ...]
    vision_seconds: float

    @property
    def text_tokens(self) -> int:
        """Tokens of the prompt that are not visual."""
        return self.input_ids.size - self.visual_positions.size

    @property
    def budget(self) -> int:
        """Original visual tokens over all images from which later stages count."""
        return sum(self.budgets)


@dataclass(frozen=True)
class GenerationResult:
    """An answer and what it cost.

    Attributes:
        text: without special tokens.
        token_ids: generated ones, a stop token included.
        finish_reason: ``stop`` token or text, or ``length`` reached.
        prompt_tokens: tokens that entered the language graph, surviving visual ones included.
        visual_tokens: original visual tokens of all images.
        stages: survivors stage by stage.
        kv_bytes: of the request's caches.
        vision_s, prefill_s, ttft_s: seconds; ttft from the call to the first token chosen, time in a queue included.
        tokens_per_s: decoding only, None if there was one token.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    visual_tokens: int
    stages: tuple[StageCount, ...]
    kv_bytes: KvBytes
    vision_s: float
    prefill_s: float
    ttft_s: float
    tokens_per_s: float | None

    @property
    def visual_tokens_kept(self) -> int:
        """Visual tokens that the last stage has kept; all of them where there is none."""
        return self.stages[-1].kept if self.stages else self.visual_tokens

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that ``run --json`` prints."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.token_ids),
            "visual_tokens": {"input": self.visual_tokens, "per_stage": [asdict(stage) for stage in self.stages]},
            "kv_bytes": asdict(self.kv_bytes),
            "vision_s": self.vision_s,
            "prefill_s": self.prefill_s,
            "ttft_s": self.ttft_s,
            "tokens_per_s": self.tokens_per_s,
        }
