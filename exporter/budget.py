"""What a schedule costs: floating-point operations of tower and decoder, bytes of KV cache. Arithmetic only, no framework.

A multiply-add counts as two operations. Everything is derived from the token counts that the schedule gives, so that a
report, a capacity and a search speak of the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from .schedule import KEEP_UNIT, Schedule, ScheduleError, Stage, cell_count, keep_count
from .shape import ModelShape

__all__ = ["Cost", "KvSegment", "cost", "kv_bytes", "solve_last_keep"]

SCORING_WIDTH = 8  # dimensions that the lowering adds to a head (plugins/importance.py)


@dataclass(frozen=True)
class KvSegment:
    """A run of decoder layers and the visual tokens that it holds."""

    first_layer: int
    end_layer: int
    visual_tokens: int


@dataclass(frozen=True)
class Cost:
    """Cost of one prefill.

    Attributes:
        visual_tokens: original visual tokens N.
        text_tokens: everything else in the prompt.
        tower_flops: patch embedding, blocks and merger.
        scoring_flops: importance and merging, as the exported graphs compute them.
        decoder_flops: layers and the head of the last token.
        tower_tokens: visual tokens in each tower block.
        decoder_tokens: visual tokens in each decoder layer.
    """

    visual_tokens: int
    text_tokens: int
    tower_flops: int
    scoring_flops: int
    decoder_flops: int
    tower_tokens: tuple[int, ...]
    decoder_tokens: tuple[int, ...]

    @property
    def flops(self) -> int:
        return self.tower_flops + self.scoring_flops + self.decoder_flops


def cost(schedule: Schedule, shape: ModelShape, *, rows: int, columns: int, text_tokens: int) -> Cost:
    """Cost of a prefill with one image of ``rows`` × ``columns`` visual tokens."""
    tokens = rows * columns
    tower, decoder = shape.tower, shape.decoder
    in_tower = tuple(keep_count(tokens, schedule.keep_at("tower", block)) for block in range(tower.blocks))
    in_decoder = tuple(keep_count(tokens, schedule.keep_at("decoder", layer)) for layer in range(decoder.layers))

    width, group = tower.embed_dim, tower.group
    tower_flops = 2 * tokens * group * tower.patch_dim * width
    for alive in in_tower:
        patches = alive * group
        tower_flops += 2 * patches * (4 * width * width + 2 * width * tower.mlp_dim) + 4 * patches * patches * width
    merged = group * width
    tower_flops += 2 * in_tower[-1] * (merged * merged + merged * decoder.hidden_size)

    attention_width = decoder.heads * decoder.head_dim
    kv_width = decoder.kv_heads * decoder.head_dim
    per_token = decoder.hidden_size * (2 * attention_width + 2 * kv_width + 3 * decoder.mlp_dim)
    decoder_flops = 2 * decoder.hidden_size * decoder.vocab_size
    for alive in in_decoder:
        length = alive + text_tokens
        decoder_flops += 2 * length * per_token + 2 * length * (length + 1) * attention_width  # causal: half of the square

    return Cost(
        tokens, text_tokens, tower_flops, _scoring_flops(schedule, shape, rows, columns), decoder_flops, in_tower, in_decoder
    )


def _scoring_flops(schedule: Schedule, shape: ModelShape, rows: int, columns: int) -> int:
    """Attention calls of the scoring and matrix products of the merging, in the form of the ONNX function bodies."""
    tower, tokens = shape.tower, rows * columns
    scored = [stage.layer - 1 for stage in schedule.tower_stages if stage.layer > 0]
    if schedule.needs_importance:
        scored.append(schedule.importance.vision_layer % tower.blocks)
    wide = tower.heads * (tower.head_dim + SCORING_WIDTH)
    wide_calls = 2 if schedule.importance.global_threshold == 0 else 3  # log-sum-exp, received attention, context relevance
    total = 0
    for block in set(scored):
        patches = keep_count(tokens, schedule.keep_at("tower", block)) * tower.group
        total += 4 * patches * patches * (wide_calls * wide + tower.embed_dim)
    for stage in schedule.stages:
        if stage.cell is not None:
            total += _merge_flops(schedule, stage, shape, tokens)
            total += 2 * cell_count(rows, stage.cell) * cell_count(columns, stage.cell) * tokens
    return total


def _merge_flops(schedule: Schedule, stage: Stage, shape: ModelShape, tokens: int) -> int:
    earlier = [s for s in schedule.stages[: schedule.stages.index(stage)]]
    alive = keep_count(tokens, earlier[-1].keep if earlier else KEEP_UNIT)
    width = shape.tower.group * shape.tower.embed_dim if stage.part == "tower" else shape.decoder.hidden_size
    return 2 * keep_count(tokens, stage.keep) * alive * width


def kv_bytes(schedule: Schedule, shape: ModelShape, *, tokens: int, bytes_per_value: int) -> int:
    """KV cache of ``tokens`` original visual tokens (text not counted), bytes."""
    decoder = shape.decoder
    per_token = 2 * decoder.kv_heads * decoder.head_dim * bytes_per_value
    return sum((end - first) * keep_count(tokens, keep) * per_token for first, end, keep in schedule.decoder_segments(decoder.layers))


def solve_last_keep(layers: int, keep: float, starts: tuple[int, ...], first_keeps: tuple[int, ...]) -> int:
    """Keep of the last decoder stage so that the average over layers is at most ``keep``.

    Args:
        starts: first layer of each stage, from 0 on; first_keeps: keep (of 1024) of all stages but the last.

    Raises:
        ScheduleError: no whole number in 1..(keep of the stage before) meets the budget.
    """
    ends = (*starts[1:], layers)
    units = int(keep * KEEP_UNIT * layers + 1e-9)
    spent = sum((b - a) * k for a, b, k in zip(starts[:-1], ends[:-1], first_keeps, strict=True))
    last = (units - spent) // (layers - starts[-1])
    ceiling = first_keeps[-1] if first_keeps else KEEP_UNIT
    if last < 1:
        raise ScheduleError(f"average keep {keep:g} cannot be met: the stages before layer {starts[-1]} already spend it")
    return min(last, ceiling)
