"""What a schedule costs: floating-point operations of tower and decoder, bytes of KV cache. Arithmetic only, no framework.

A multiply-add counts as two operations. Everything is derived from the token counts that the schedule gives, so that a
report, a capacity and a search speak of the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .schedule import KEEP_UNIT, Schedule, ScheduleError, Stage, keep_count
from .shape import ModelShape, TowerShape

__all__ = ["Cost", "Traffic", "cost", "kv_bytes", "prefill_flops", "spend_keep", "traffic"]

SCORING_WIDTH = 8  # dimensions that the lowering adds to a head (plugins/importance.py)


@dataclass(frozen=True)
class Cost:
    """Cost of one prefill with one image; FLOPs of each block and layer stand beside the visual tokens that it sees.

    Attributes:
        tower_tokens, tower_block_flops: per tower block.
        embed_flops: patch embedding and mergers.
        scoring_flops: importance and merging, as the exported graphs compute them.
        decoder_tokens, decoder_layer_flops: per decoder layer; the sequence is these and the text.
        guidance_flops: the last token's attention at stages that look at it.
        head_flops: logits of the last token.
    """

    tower_tokens: tuple[int, ...]
    tower_block_flops: tuple[int, ...]
    embed_flops: int
    scoring_flops: int
    decoder_tokens: tuple[int, ...]
    decoder_layer_flops: tuple[int, ...]
    guidance_flops: int
    head_flops: int

    @property
    def tower_flops(self) -> int:
        """Vision graph without scoring."""
        return self.embed_flops + sum(self.tower_block_flops)

    @property
    def decoder_flops(self) -> int:
        """Language graph."""
        return sum(self.decoder_layer_flops) + self.guidance_flops + self.head_flops

    @property
    def flops(self) -> int:
        """Whole prefill."""
        return self.tower_flops + self.scoring_flops + self.decoder_flops


def cost(schedule: Schedule, shape: ModelShape, *, rows: int, columns: int, text_tokens: int) -> Cost:
    """Cost of a prefill with one image of ``rows`` × ``columns`` visual tokens and ``text_tokens`` others."""
    tokens = rows * columns
    tower, decoder = shape.tower, shape.decoder
    in_tower = tuple(keep_count(tokens, schedule.keep_at("tower", block)) for block in range(tower.blocks))
    in_decoder = tuple(keep_count(tokens, schedule.keep_at("decoder", layer)) for layer in range(decoder.layers))
    width, merged = tower.embed_dim, tower.group * tower.embed_dim
    merged_tokens = sum(in_tower[block] for block in tower.merged_blocks)
    embed = 2 * tokens * tower.group * tower.patch_dim * width + 2 * merged_tokens * merged * (merged + decoder.hidden_size)

    # The graphs lay survivors out in whole windows.
    in_windows = tower.windows(rows) * tower.windows(columns) * (tower.window**2 * tower.group) ** 2 if tower.window else 0

    def block_flops(block: int) -> int:
        patches = in_tower[block] * tower.group
        pairs = patches * patches if tower.looks_everywhere(block) else in_windows
        return 2 * patches * width * (4 * width + tower.mlp_matrices * tower.mlp_dim) + 4 * pairs * width

    attention_width, kv_width = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    per_token = decoder.hidden_size * (2 * attention_width + 2 * kv_width + 3 * decoder.mlp_dim)

    def layer_flops(alive: int) -> int:
        length = alive + text_tokens
        return 2 * length * per_token + 2 * length * (length + 1) * attention_width  # causal: half of the square

    guided = schedule.later_stages if schedule.guidance_weight > 0 else ()
    guidance = sum(4 * (in_decoder[stage.layer - 1] + text_tokens) * attention_width for stage in guided)  # products taken twice
    return Cost(
        tower_tokens=in_tower,
        tower_block_flops=tuple(map(block_flops, range(tower.blocks))),
        embed_flops=embed,
        scoring_flops=_scoring_flops(schedule, shape, rows, columns),
        decoder_tokens=in_decoder,
        decoder_layer_flops=tuple(map(layer_flops, in_decoder)),
        guidance_flops=guidance,
        head_flops=2 * decoder.hidden_size * decoder.vocab_size,
    )


def prefill_flops(schedule: Schedule, shape: ModelShape, grids: Sequence[tuple[int, int]], *, text_tokens: int, scoring: bool = True) -> int:
    """FLOPs of a prefill with images of these rows × columns; without ``scoring``, what choosing tokens costs is left out."""
    total = cost(schedule, shape, rows=1, columns=sum(rows * columns for rows, columns in grids), text_tokens=text_tokens).decoder_flops
    for rows, columns in grids:
        image = cost(schedule, shape, rows=rows, columns=columns, text_tokens=0)
        total += image.tower_flops + (image.scoring_flops if scoring else 0)
    return total


def _scoring_flops(schedule: Schedule, shape: ModelShape, rows: int, columns: int) -> int:
    """Attention calls of the scoring and matrix products of the merging, in the form of the ONNX function bodies."""
    tower, tokens = shape.tower, rows * columns
    wide = tower.heads * (tower.head_dim + SCORING_WIDTH)
    settings, total = schedule.importance, 0
    for block in schedule.scoring_blocks(tower):
        patches = keep_count(tokens, schedule.keep_at("tower", block)) * tower.group
        looked_at = keep_count(patches, settings.score_rows)
        total += _lse_flops(looked_at, patches, tower, wide) + 4 * patches * (looked_at + 1) * wide  # then received attention
        if settings.global_threshold > 0:
            chosen = keep_count(patches, settings.global_rows)
            total += 4 * patches * (chosen + 1) * wide
            if settings.score_rows < KEEP_UNIT:
                total += _lse_flops(chosen, patches, tower, wide)  # these rows' log-sum-exp was not among the sample
    for stage in schedule.stages:
        if stage.cell is not None:
            total += _merge_flops(schedule, stage, shape, tokens)
    return total


def _lse_flops(rows: int, patches: int, tower: TowerShape, wide: int) -> int:
    """Log-sum-exp of ``rows``: a call for the guess, and one over a key more than there are patches."""
    return 4 * rows * (patches * tower.embed_dim + (patches + 1) * wide)


def _merge_flops(schedule: Schedule, stage: Stage, shape: ModelShape, tokens: int) -> int:
    earlier = schedule.stages[: schedule.stages.index(stage)]
    alive = keep_count(tokens, earlier[-1].keep if earlier else KEEP_UNIT)
    if stage.part == "tower":
        given = sum(block < stage.layer for block in shape.tower.deepstack_blocks)  # blocks whose features for the decoder travel with a token
        width = shape.tower.group * shape.tower.embed_dim + given * shape.decoder.hidden_size
    else:
        width = shape.visual_width
    if schedule.proportional_attention and any(before.recycle is not None for before in earlier):
        width += 1  # how many tokens each stands for is summed like a feature
    return 2 * keep_count(tokens, stage.keep) * alive * width


@dataclass(frozen=True)
class Traffic:
    """Bytes that matrix products and attention must move at least, each operand and each result once and no attention map.

    Attributes:
        tower: vision graph; scoring and merging are left out, they read what a block reads.
        decoder: prefill. step: one token after it, of a batch of one: the weights and the KV cache.
    """

    tower: int
    decoder: int
    step: int


def traffic(schedule: Schedule, shape: ModelShape, *, rows: int, columns: int, text_tokens: int, bytes_per_value: int) -> Traffic:
    """Traffic of a prefill as in ``cost``, and of the token behind it."""
    counted = cost(schedule, shape, rows=rows, columns=columns, text_tokens=text_tokens)
    tower, decoder, tokens = shape.tower, shape.decoder, rows * columns
    width, merged, hidden = tower.embed_dim, tower.group * tower.embed_dim, decoder.hidden_size
    merging = [counted.tower_tokens[block] for block in tower.merged_blocks]  # tokens of each merger
    embed = tower.patch_dim * width + len(merging) * merged * (merged + hidden)
    embed += tokens * tower.group * (tower.patch_dim + width) + sum(merging) * (3 * merged + hidden)
    mlp_width = tower.mlp_matrices * tower.mlp_dim
    block_weights, block_values = width * (4 * width + mlp_width), 12 * width + mlp_width
    blocks = sum(block_weights + alive * tower.group * block_values for alive in counted.tower_tokens)

    attention, kv = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    layer_weights = hidden * (2 * attention + 2 * kv + 3 * decoder.mlp_dim)
    token_values = 7 * hidden + 4 * attention + 4 * kv + 3 * decoder.mlp_dim
    lengths = [alive + text_tokens for alive in counted.decoder_tokens]
    head = decoder.vocab_size * (hidden + 1) + hidden
    layers = sum(layer_weights + length * token_values for length in lengths)
    step = sum(layer_weights + token_values + 2 * length * kv for length in lengths)
    return Traffic((embed + blocks) * bytes_per_value, (layers + head) * bytes_per_value, (step + head) * bytes_per_value)


def kv_bytes(schedule: Schedule, shape: ModelShape, *, tokens: int, bytes_per_value: int) -> int:
    """KV cache of ``tokens`` original visual tokens (text not counted), bytes."""
    decoder = shape.decoder
    per_token = 2 * decoder.kv_heads * decoder.head_dim * bytes_per_value
    bias = bytes_per_value if schedule.proportional_attention else 0  # of a token in a segment, whatever its layers
    segments = schedule.decoder_segments(decoder.layers)
    return sum(keep_count(tokens, keep) * ((end - first) * per_token + bias) for first, end, keep in segments)


def spend_keep(layers: int, keep: float, starts: Sequence[int], choose: Callable[[int, int, int], float]) -> tuple[int, ...]:
    """Keeps (of 1024) of decoder stages whose average over layers is ``keep``, as nearly as whole numbers of 1024 come below it.

    Stage by stage, ``choose(number, least, most)`` picks from what the budget leaves open: less than ``least`` could not be spent by the
    stages behind (keeps never grow), more than ``most`` would leave them less than 1. What is chosen is rounded and held in those
    bounds; the last stage takes what is left.

    Args:
        starts: first layer of each stage, from 0 on.

    Raises:
        ScheduleError: less than 1/1024 for each layer.
    """
    lengths = [end - start for start, end in zip(starts, (*starts[1:], layers), strict=True)]
    left, ceiling = int(keep * KEEP_UNIT * layers + 1e-9), KEEP_UNIT
    if left < layers:
        raise ScheduleError(f"average keep {keep:g} cannot be met: it leaves less than 1/{KEEP_UNIT} of the visual tokens to a layer")
    keeps: list[int] = []
    for number, length in enumerate(lengths):
        behind = sum(lengths[number + 1 :])
        most = min(ceiling, (left - behind) // length)
        least = min(most, -(-left // (length + behind)))
        keeps.append(min(most, max(least, round(choose(number, least, most)))) if behind else most)
        left, ceiling = left - keeps[-1] * length, keeps[-1]
    return tuple(keeps)
