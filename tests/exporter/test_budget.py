"""Budget arithmetic: FLOPs against a count operation by operation and the table of the method, KV bytes, the last ratio, presets."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vflow.exporter.budget import cost, kv_bytes, spend_keep, traffic
from vflow.exporter.presets import PRESETS, preset_schedule
from vflow.exporter.schedule import Importance, Schedule, ScheduleError, Stage, unpruned_schedule
from vflow.exporter.shape import DecoderShape, ModelShape, TowerShape

SMALL = ModelShape(TowerShape(2, 8, 2, 16, 12, 2), DecoderShape(3, 8, 2, 1, 4, 20, 30))
QWEN2_VL_2B = ModelShape(TowerShape(32, 1280, 16, 5120, 1176, 2), DecoderShape(28, 1536, 12, 2, 128, 8960, 151_936))
ROUNDING = Fraction(1, 10**12)  # a binary fraction is not the decimal that was asked for


def matmul(rows: int, inner: int, columns: int) -> int:
    """Operations of a matrix product, counted."""
    return sum(2 for _ in range(rows) for _ in range(inner) for _ in range(columns))


def count_by_hand(shape: ModelShape, tower: list[int], decoder: list[int], tokens: int, text: int, windows: int = 0) -> tuple[int, int]:
    """Operations of tower and decoder, product by product."""
    t, d = shape.tower, shape.decoder
    vision = matmul(tokens * t.group, t.patch_dim, t.embed_dim)
    for number, alive in enumerate(tower):
        p = alive * t.group
        vision += matmul(p, t.embed_dim, 3 * t.embed_dim) + matmul(p, t.embed_dim, t.embed_dim)  # qkv, proj
        vision += matmul(p, t.embed_dim, t.mlp_dim) * (t.mlp_matrices - 1) + matmul(p, t.mlp_dim, t.embed_dim)
        for seen in [p] if t.looks_everywhere(number) else [t.window**2 * t.group] * windows:  # whole windows, survivors or not
            vision += t.heads * (matmul(seen, t.head_dim, seen) + matmul(seen, seen, t.head_dim))
    merged = t.group * t.embed_dim
    vision += matmul(tower[-1], merged, merged) + matmul(tower[-1], merged, d.hidden_size)
    language = matmul(1, d.hidden_size, d.vocab_size)
    for alive in decoder:
        s = alive + text
        language += matmul(s, d.hidden_size, d.heads * d.head_dim) * 2 + matmul(s, d.hidden_size, d.kv_heads * d.head_dim) * 2
        language += 3 * matmul(s, d.hidden_size, d.mlp_dim)
        for row in range(s):  # causal: a row sees itself and what is before
            language += d.heads * (matmul(1, d.head_dim, row + 1) + matmul(1, row + 1, d.head_dim))
    return vision, language


def test_flops_are_those_counted_product_by_product() -> None:
    schedule = Schedule((Stage("tower", 1, 700), Stage("decoder", 0, 500), Stage("decoder", 2, 100)))
    result = cost(schedule, SMALL, rows=2, columns=3, text_tokens=5)
    assert result.tower_tokens == (6, 5)
    assert result.decoder_tokens == (3, 3, 1)
    assert (result.tower_flops, result.decoder_flops) == count_by_hand(SMALL, [6, 5], [3, 3, 1], 6, 5)
    assert result.flops == result.tower_flops + result.scoring_flops + result.decoder_flops


def test_flops_of_a_tower_with_windows_are_those_counted_product_by_product() -> None:
    shape = replace(SMALL, tower=TowerShape(3, 8, 2, 16, 12, 2, mlp_matrices=3, window=2, full_blocks=(1,)))
    schedule = Schedule((Stage("tower", 2, 500), Stage("decoder", 0, 400)))
    size = {"rows": 4, "columns": 5, "text_tokens": 5}
    result = cost(schedule, shape, **size)
    assert result.tower_tokens == (20, 20, 10)
    assert (result.tower_flops, result.decoder_flops) == count_by_hand(shape, [20, 20, 10], [8, 8, 8], 20, 5, windows=2 * 3)
    plain = replace(shape, tower=replace(shape.tower, mlp_matrices=2))
    moved = [traffic(schedule, model, **size, bytes_per_value=2).tower for model in (shape, plain)]
    assert moved[0] - moved[1] == 2 * (3 * 8 * 16 + 4 * (20 + 20 + 10) * 16)  # a matrix of each block, and what it gives for each patch


def test_a_merger_of_deepstack_costs_and_moves_what_its_block_has_alive() -> None:
    giving = replace(SMALL, tower=replace(SMALL.tower, deepstack_blocks=(0, 1)))
    schedule = Schedule((Stage("tower", 1, 512),))
    size: dict[str, int] = {"rows": 4, "columns": 5, "text_tokens": 3}
    theirs, plain = (cost(schedule, shape, **size) for shape in (giving, SMALL))
    assert theirs.embed_flops - plain.embed_flops == sum(matmul(alive, 32, 32) + matmul(alive, 32, 8) for alive in (20, 10))
    moved = [traffic(schedule, shape, **size, bytes_per_value=2).tower for shape in (giving, SMALL)]
    assert moved[0] - moved[1] == 2 * (2 * (32 * 32 + 32 * 8) + (20 + 10) * (3 * 32 + 8))  # weights; in, between twice, out


def test_the_2b_shape_costs_what_the_method_says() -> None:
    full = cost(unpruned_schedule(), QWEN2_VL_2B, rows=32, columns=32, text_tokens=64)
    assert sum(full.tower_block_flops) / 1e12 == pytest.approx(7.9, abs=0.05)  # its table leaves out patch embedding and merger
    assert full.embed_flops / full.tower_flops < 0.015
    assert full.decoder_flops / 1e12 == pytest.approx(3.0, abs=0.05)
    assert full.scoring_flops == 0


def test_decoder_stages_alone_gain_at_most_what_the_method_says() -> None:
    full, pruned = (
        cost(schedule, QWEN2_VL_2B, rows=32, columns=32, text_tokens=64) for schedule in (unpruned_schedule(), Schedule((Stage("decoder", 0, 102),)))
    )
    assert full.flops / (pruned.flops - pruned.scoring_flops) == pytest.approx(1.30, abs=0.02)


def test_tower_stages_gain_what_the_method_says() -> None:
    schedule = Schedule((Stage("tower", 4, 512), Stage("tower", 12, 256), Stage("decoder", 0, 102)))
    full = cost(unpruned_schedule(), QWEN2_VL_2B, rows=32, columns=32, text_tokens=64)
    pruned = cost(schedule, QWEN2_VL_2B, rows=32, columns=32, text_tokens=64)
    assert full.flops / (pruned.flops - pruned.scoring_flops) == pytest.approx(3.44, abs=0.05)


def test_scoring_is_counted_as_the_function_bodies_compute_it() -> None:
    patches, heads, wide = 24, 2, 4 + 8  # head_dim + the eight dimensions that the lowering adds

    def attention(rows: int, columns: int, width: int) -> int:
        return heads * 2 * matmul(rows, width, columns)  # scores, then the mix

    # Log-sum-exp with its guess and one more key, received attention with roles swapped and one more row.
    every_row = attention(patches, patches, 4) + attention(patches, patches + 1, wide) + attention(patches, patches + 1, wide)
    for threshold, extra in ((0.0, 0), (0.5, attention(patches, patches + 1, wide)), (3.0, attention(patches, 9 + 1, wide))):
        schedule = Schedule((Stage("decoder", 0, 100),), Importance(global_threshold=threshold))  # fewer than 24 / 3 exceed 3; 9 in 1/1024
        assert cost(schedule, SMALL, rows=2, columns=3, text_tokens=0).scoring_flops == every_row + extra


def test_merging_is_counted_as_a_product() -> None:
    plain, merging = (Schedule((Stage("decoder", 0, 100, recycle),)) for recycle in (None, 2.0))
    without, with_merging = (cost(schedule, SMALL, rows=2, columns=9, text_tokens=0).scoring_flops for schedule in (plain, merging))
    kept, tokens = 2, 18
    assert with_merging - without == matmul(kept, tokens, 8)


def test_a_block_that_ranks_for_two_stages_is_scored_once() -> None:
    once = Schedule((Stage("decoder", 0, 100),))
    both = Schedule((Stage("decoder", 0, 100), Stage("decoder", 1, 50)))
    assert cost(once, SMALL, rows=4, columns=4, text_tokens=0).scoring_flops == cost(both, SMALL, rows=4, columns=4, text_tokens=0).scoring_flops
    assert cost(Schedule((Stage("tower", 0, 100),)), SMALL, rows=4, columns=4, text_tokens=0).scoring_flops == 0  # pixels alone


def test_kv_bytes_are_two_vectors_a_token_a_layer_a_head() -> None:
    schedule = Schedule((Stage("decoder", 0, 512), Stage("decoder", 1, 100)))
    kept = [50, 10, 10]  # of 100 tokens, layer by layer: ⌈50⌉, ⌈9.77⌉
    assert kv_bytes(schedule, SMALL, tokens=100, bytes_per_value=2) == sum(2 * 1 * 4 * 2 * k for k in kept)
    assert kv_bytes(unpruned_schedule(), QWEN2_VL_2B, tokens=1, bytes_per_value=2) == 2 * 2 * 128 * 2 * 28
    merged = (Stage("decoder", 0, 512, 2.0), Stage("decoder", 1, 100))
    plain, biased = Schedule(merged), Schedule(merged, proportional_attention=2.0)
    more = kv_bytes(biased, SMALL, tokens=100, bytes_per_value=2) - kv_bytes(plain, SMALL, tokens=100, bytes_per_value=2)
    assert more == 2 * (50 + 10)  # one value a token a segment


def test_stages_get_what_is_wished_within_the_budget_and_the_last_takes_the_rest() -> None:
    wishes = (800, 500, 0)
    assert spend_keep(6, 0.5, (0, 2, 4), lambda number, least, most: wishes[number]) == (800, 500, (512 * 6 - 1600 - 1000) // 2)
    assert spend_keep(6, 0.1, (0,), lambda *_: 0) == (102,)
    assert spend_keep(6, 0.9, (0, 3), lambda *_: 600) == (922, 921)  # 600 first could not be spent behind


def test_a_budget_below_one_of_1024_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"average keep 0\.0005 cannot be met"):
        spend_keep(6, 0.0005, (0, 2, 4), lambda *_: 1)


@given(
    keep=st.floats(1 / 1024, 1.0), layers=st.integers(3, 100), wishes=st.tuples(*[st.floats(-10, 2000, allow_nan=False)] * 3), data=st.data(),
)  # fmt: skip
def test_a_budget_is_spent_but_for_rounding(keep: float, layers: int, wishes: tuple[float, ...], data: st.DataObject) -> None:
    starts = (0, *sorted(data.draw(st.sets(st.integers(1, layers - 1), min_size=2, max_size=2))))
    keeps = spend_keep(layers, keep, starts, lambda number, least, most: wishes[number])
    lengths = (starts[1], starts[2] - starts[1], layers - starts[2])
    spent = sum(length * value for length, value in zip(lengths, keeps, strict=True))
    assert list(keeps) == sorted(keeps, reverse=True)
    assert keep * 1024 * layers - lengths[2] - 1 < spent <= keep * 1024 * layers + 1e-6


@given(
    name=st.sampled_from(sorted(PRESETS)), keep=st.floats(1 / 1024, 1.0), layers=st.integers(1, 100), blocks=st.integers(1, 60),
)  # fmt: skip
def test_no_preset_exceeds_its_budget_or_leaves_its_model(name: str, keep: float, layers: int, blocks: int) -> None:
    shape = ModelShape(TowerShape(blocks, 8, 2, 16, 12, 2), DecoderShape(layers, 8, 2, 1, 4, 20, 30))
    schedule = preset_schedule(name, shape, keep)
    spent = sum(Fraction((end - first) * units, 1024 * layers) for first, end, units in schedule.decoder_segments(layers))
    assert spent <= Fraction(keep) + ROUNDING
    schedule.check(shape)
    assert Schedule.from_dict(schedule.to_dict()) == schedule


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("keep", [0.05, 0.1, 0.25, 0.5])
def test_presets_spend_their_budget_to_a_hundredth(name: str, keep: float) -> None:
    assert preset_schedule(name, QWEN2_VL_2B, keep).average_keep(28) == pytest.approx(keep, rel=0.01)


def test_the_paper_preset_is_the_published_schedule_and_nothing_beyond() -> None:
    schedule = preset_schedule("paper", QWEN2_VL_2B, 0.10)
    assert [(stage.part, stage.layer) for stage in schedule.stages] == [("decoder", 0), ("decoder", 18)]  # before layer 9 the ratio is 1.0
    assert schedule.stages[0].keep == round(0.117 * 1024)
    assert schedule.stages[0].recycle == 17.4
    assert schedule.importance == Importance(global_threshold=39.3, entropy_weight=0.0)
    assert (schedule.guidance_weight, schedule.recycled_importance, schedule.tower_stages) == (0.0, "own", ())


def test_between_published_keeps_the_paper_preset_scales_the_nearest_first_stage() -> None:
    schedule = preset_schedule("paper", QWEN2_VL_2B, 0.20)
    assert schedule.stages[0].keep == round(0.265 / 0.25 * 0.20 * 1024)
    assert (schedule.stages[0].recycle, schedule.importance.global_threshold) == (15.6, 34.8)


def test_the_untuned_preset_keeps_more_early_and_less_late() -> None:
    stages = preset_schedule("progressive", QWEN2_VL_2B, 0.10).stages
    assert [stage.layer for stage in stages] == [0, 9, 18]
    assert [stage.keep for stage in stages[:2]] == [round(1.3 * 0.10 * 1024), round(0.10 * 1024)]


def test_the_tower_preset_halves_at_an_eighth_of_the_tower_and_again_at_three_eighths() -> None:
    schedule = preset_schedule("tower", QWEN2_VL_2B, 0.10)
    assert [(stage.layer, stage.keep) for stage in schedule.tower_stages] == [(4, 512), (12, 256)]
    assert schedule.importance.score_rows == 256
    small = replace(QWEN2_VL_2B, tower=replace(QWEN2_VL_2B.tower, blocks=4))
    assert [stage.layer for stage in preset_schedule("tower", small, 0.10).tower_stages] == [2, 3]  # block 0 ranks no better than chance


def test_with_windows_the_tower_preset_cuts_behind_blocks_that_look_at_the_whole_image() -> None:
    windowed = replace(QWEN2_VL_2B, tower=replace(QWEN2_VL_2B.tower, window=4, full_blocks=(7, 15, 23, 31)))
    schedule = preset_schedule("tower", windowed, 0.10)
    schedule.check(windowed)
    assert [(stage.layer, stage.keep) for stage in schedule.tower_stages] == [(8, 512), (16, 256)]
    for full_blocks, places in (((31,), []), ((7, 15), [8]), ((), [])):  # behind the last of them nothing is left to rank for the decoder
        few = replace(windowed, tower=replace(windowed.tower, full_blocks=full_blocks))
        assert [stage.layer for stage in preset_schedule("tower", few, 0.10).tower_stages] == places


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_keeping_everything_prunes_nothing(name: str) -> None:
    schedule = preset_schedule(name, QWEN2_VL_2B, 1.0)
    assert all(stage.keep == 1024 for stage in schedule.stages)
    assert schedule.average_keep(28) == 1.0


@pytest.mark.parametrize(
    ("name", "keep"), [("best", 0.1), ("paper", 0.0), ("paper", 1.01), ("tower", -0.1), ("tower", float("nan")), ("paper", 0.0009)]
)
def test_presets_refuse_unknown_names_and_budgets(name: str, keep: float) -> None:
    with pytest.raises(ScheduleError, match=r"unknown preset|keep must be above 0|below 1/1024"):
        preset_schedule(name, QWEN2_VL_2B, keep)


@pytest.mark.parametrize("spent", [60, 109, 207, 403, 480, 718])
def test_a_share_that_is_a_whole_number_of_1024_is_not_rounded_below_it(spent: int) -> None:
    """In floating point these shares times 1,024 times the layers come out a little less."""
    keep = spent / (1024 * 11)
    assert int(keep * 1024 * 11) == spent - 1
    keeps = spend_keep(11, keep, range(11), lambda number, least, most: least)
    assert sum(keeps) == spent
