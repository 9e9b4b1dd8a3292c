"""The PyTorch reference: nothing pruned it is Hugging Face's model, pruned it is the method as ``naive.py`` writes it down."""

from __future__ import annotations

from typing import Any

import naive
import numpy as np
import pytest
import torch
from schedules import DEEPSTACK_SCHEDULES, SCHEDULES, WINDOWED_SCHEDULES
from support import picture
from torch import Tensor
from vflow.engines.positions import ImageSurvivors, prompt_positions
from vflow.engines.preprocess import ImageProcessorConfig, preprocess_image
from vflow.exporter.model import pruned_graphs
from vflow.exporter.models import Embedded, model_shape, pixel_importance
from vflow.exporter.models.language import _extend_bias
from vflow.exporter.schedule import Schedule, Stage, unpruned_schedule

PROCESSOR = ImageProcessorConfig(4, 2, 2, 64, 64 * 64, (0.5, 0.4, 0.45), (0.25, 0.3, 0.27))
IMAGE, TEXT_BEFORE, TEXT_AFTER = 5, [1, 8, 3], [4, 12, 15, 9, 2, 1, 9]
FP32 = 2e-4  # absolute, logits of up to about 6 and features of about 3 after three and four layers of random weights
GRIDS = [(5, 6), (3, 9), (1, 1), (1, 7)]


def inputs(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """An image as the vision graph takes it: pixels [rows, columns, 4, 96] and entropy [rows, columns, 4]."""
    patches = preprocess_image(picture(rows, columns, seed=rows * 31 + columns), PROCESSOR)
    pixels = torch.from_numpy(patches.pixel_values).reshape(rows, columns, 4, -1)
    return pixels, torch.from_numpy(patches.entropy).reshape(rows, columns, 4)


def run_vision(model: Any, schedule: Schedule, rows: int, columns: int) -> Embedded:
    vision, _ = pruned_graphs(model, model_shape(model.config), schedule)
    pixels, entropy = inputs(rows, columns)
    with torch.no_grad():
        embedded: Embedded = vision(pixels, entropy, torch.zeros(rows * columns, dtype=torch.int32))
    return embedded


def prompt(schedule: Schedule, rows: int, columns: int, index: Tensor) -> tuple[list[int], Tensor, list[int]]:
    input_ids = TEXT_BEFORE + [IMAGE] * len(index) + TEXT_AFTER
    survivors = ImageSurvivors(rows, columns, index.numpy())
    positions, _ = prompt_positions(np.array(input_ids), [survivors], image_token=IMAGE, renumber_first_stage=schedule.renumber_first_stage)
    return input_ids, torch.from_numpy(positions), list(range(len(TEXT_BEFORE), len(TEXT_BEFORE) + len(index)))


def run_language(
    model: Any, schedule: Schedule, input_ids: list[int], positions: Tensor, image: Embedded, columns: list[int], budget: int
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    _, language = pruned_graphs(model, model_shape(model.config), schedule)
    segments = schedule.decoder_segments(4)
    length, head_dim = len(input_ids), language.shape.head_dim
    caches = [(torch.zeros(1, 2, length + 2, head_dim), torch.zeros(1, 2, length + 2, head_dim)) for _ in range(4)]
    biases = [torch.zeros(1, 1, length + 2, 1) for _ in segments] if image.key_bias is not None else []
    with torch.no_grad():
        logits, hidden, present, _ = language(
            torch.tensor([input_ids]), positions[:, None], image.visual_embeds, torch.tensor(columns, dtype=torch.long), image.importance,
            torch.zeros(budget, dtype=torch.int32), image.key_bias, torch.zeros(1, len(segments), dtype=torch.long), caches, biases,
        )  # fmt: skip
    return logits[0], hidden[0], present


def naive_language(
    model: Any, schedule: Schedule, input_ids: list[int], positions: Tensor, image: Embedded, columns: list[int], budget: int
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """The other walk of the decoder, on what the first one's tower has left."""
    stands = [1] * len(columns) if image.key_bias is None else (image.key_bias / schedule.proportional_attention).exp().round().int().tolist()
    return naive.language(model, schedule, input_ids, positions, image.visual_embeds, columns, image.importance.tolist(), stands, budget)


@pytest.mark.parametrize("kind", ["model", "untied_model", "windowed_model", "deepstack_model"])
@pytest.mark.parametrize(("rows", "columns"), [(5, 6), (8, 3)])
def test_with_nothing_pruned_it_is_hugging_face_s_model(request: pytest.FixtureRequest, kind: str, rows: int, columns: int) -> None:
    model, schedule = request.getfixturevalue(kind), unpruned_schedule()
    image = run_vision(model, schedule, rows, columns)
    input_ids, positions, places = prompt(schedule, rows, columns, image.index)
    logits, hidden, _ = run_language(model, schedule, input_ids, positions, image, places, rows * columns)
    ids = torch.tensor([input_ids])
    with torch.no_grad():
        theirs = model(
            input_ids=ids, mm_token_type_ids=(ids == IMAGE).int(), pixel_values=inputs(rows, columns)[0].reshape(-1, 96),
            image_grid_thw=torch.tensor([[1, 2 * rows, 2 * columns]]), use_cache=False, output_hidden_states=True,
        )  # fmt: skip
    torch.testing.assert_close(logits, theirs.logits[0, -1], rtol=0, atol=1e-4)
    torch.testing.assert_close(hidden, theirs.hidden_states[-1][0, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["model", "deepstack_model"])
def test_text_alone_is_hugging_face_s_model(request: pytest.FixtureRequest, kind: str) -> None:
    model = request.getfixturevalue(kind)
    schedule, ids = unpruned_schedule(), [1, 8, 20, 21, 2, 1, 9]
    positions = torch.arange(len(ids)).expand(3, -1)
    none = Embedded(torch.zeros(0, model_shape(model.config).visual_width), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    logits, _, _ = run_language(model, schedule, ids, positions, none, [], 0)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_tower_and_first_stage_are_those_of_the_method(model: Any, schedule: Schedule, rows: int, columns: int) -> None:
    pixels, entropy = inputs(rows, columns)
    expected, scores, survivors, stands = naive.vision(model, schedule, pixels, entropy, rows * columns)
    image = run_vision(model, schedule, rows, columns)
    assert image.index.tolist() == survivors
    torch.testing.assert_close(image.visual_embeds.double(), expected, rtol=0, atol=FP32)
    np.testing.assert_allclose(image.importance.numpy(), scores, rtol=1e-4, atol=1e-7)
    weight = schedule.proportional_attention
    assert (image.key_bias is not None) == bool(weight)
    if image.key_bias is not None:
        np.testing.assert_allclose(image.key_bias.numpy(), weight * np.log(stands), rtol=1e-6)
        assert rows * columns < 2 or max(stands) > 1


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_the_decoder_is_that_of_the_method(model: Any, schedule: Schedule, rows: int, columns: int) -> None:
    image = run_vision(model, schedule, rows, columns)
    input_ids, positions, places = prompt(schedule, rows, columns, image.index)
    logits, hidden, present = run_language(model, schedule, input_ids, positions, image, places, rows * columns)
    expected, last, alive = naive_language(model, schedule, input_ids, positions, image, places, rows * columns)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=FP32)
    torch.testing.assert_close(hidden.double(), last, rtol=0, atol=FP32)
    for (key, _), columns_alive in zip(present, alive, strict=True):
        assert int(key.abs().sum((0, 1, 3)).count_nonzero()) == len(columns_alive)


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
@pytest.mark.parametrize("name", WINDOWED_SCHEDULES)
def test_a_tower_that_looks_at_windows_is_that_of_the_method(windowed_model: Any, name: str, rows: int, columns: int) -> None:
    schedule = WINDOWED_SCHEDULES[name]
    schedule.check(model_shape(windowed_model.config))
    test_tower_and_first_stage_are_those_of_the_method(windowed_model, schedule, rows, columns)
    test_the_decoder_is_that_of_the_method(windowed_model, schedule, rows, columns)


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
@pytest.mark.parametrize("name", DEEPSTACK_SCHEDULES)
def test_what_blocks_give_to_decoder_layers_is_pruned_and_merged_with_its_tokens(deepstack_model: Any, name: str, rows: int, columns: int) -> None:
    test_tower_and_first_stage_are_those_of_the_method(deepstack_model, DEEPSTACK_SCHEDULES[name], rows, columns)
    test_the_decoder_is_that_of_the_method(deepstack_model, DEEPSTACK_SCHEDULES[name], rows, columns)


def test_a_smaller_budget_counts_from_fewer_tokens(model: Any) -> None:
    schedule = SCHEDULES["tower and decoder"]
    vision, _ = pruned_graphs(model, model_shape(model.config), schedule)
    pixels, entropy = inputs(5, 6)
    with torch.no_grad():
        embeds, _, index, _ = vision(pixels, entropy, torch.zeros(15, dtype=torch.int32))
    expected, _, survivors, _ = naive.vision(model, schedule, pixels, entropy, 15)
    assert index.tolist() == survivors
    assert len(index) == naive.count_of(15, 400)
    torch.testing.assert_close(embeds.double(), expected, rtol=0, atol=FP32)


def test_text_survives_every_stage(model: Any) -> None:
    schedule = SCHEDULES["guidance alone"]
    image = run_vision(model, schedule, 5, 6)
    input_ids, positions, places = prompt(schedule, 5, 6, image.index)
    _, _, alive = naive_language(model, schedule, input_ids, positions, image, places, 30)
    text = set(range(len(input_ids))) - set(places)
    assert all(text <= set(columns) for columns in alive)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_protected_tokens_survive_whatever_guidance_says(model: Any, beta: float) -> None:
    schedule = Schedule((Stage("decoder", 0, 600, 3.0), Stage("decoder", 2, 200)), recycled_importance="protected", guidance_weight=beta)
    image = run_vision(model, schedule, 5, 6)
    input_ids, positions, places = prompt(schedule, 5, 6, image.index)
    protected = {place for place, importance in zip(places, image.importance.tolist(), strict=True) if importance > 1e29}
    assert 0 < len(protected) < naive.count_of(30, 200)
    logits, _, _ = run_language(model, schedule, input_ids, positions, image, places, 30)
    expected, _, alive = naive_language(model, schedule, input_ids, positions, image, places, 30)
    assert protected <= set(alive[-1])
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=FP32)


@pytest.mark.parametrize(("length", "starts"), [(5, [0, 3]), (1, [6, 0]), (7, [0, 0]), (3, [4, 1])])
def test_what_is_added_to_scores_is_kept_where_its_tokens_are(length: int, starts: list[int]) -> None:
    past, added = torch.randn(2, 1, 8, 1), torch.randn(2, length, 1)
    expected = past.clone()
    for row, start in enumerate(starts):
        expected[row, 0, start : start + length] = added[row]
    once = _extend_bias(past, added, torch.tensor(starts))
    assert torch.equal(once, expected)
    assert torch.equal(_extend_bias(once, added, torch.tensor(starts)), expected)  # written over itself


def test_a_blank_area_has_no_pixel_importance() -> None:
    patches = torch.cat([torch.full((4, 12), 0.3), torch.randn(4, 12, generator=torch.Generator().manual_seed(0))]).reshape(1, 2, 4, 12)
    blank, grained = pixel_importance(patches, torch.tensor([0.0] * 4 + [5.0] * 4)).tolist()
    assert blank == pytest.approx(0.0, abs=1e-3)
    assert grained > 1.0
    with pytest.raises(ValueError, match="needs the patches' entropy"):
        pixel_importance(patches, None)
