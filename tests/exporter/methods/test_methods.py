"""What holds for every method: budgets, exact counts, order, and that it can be repeated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import picture
from torch import Tensor
from vflow.engines.preprocess import ImageProcessorConfig, preprocess_image
from vflow.exporter.methods import METHODS
from vflow.exporter.methods.base import Method
from vflow.exporter.model import pruned_graphs
from vflow.exporter.models import model_shape
from vflow.exporter.schedule import Schedule, ScheduleError, keep_count
from vflow.exporter.shape import DecoderShape, ModelShape, TowerShape

KEEPS = [1.0, 0.5, 0.33, 0.22, 0.11, 0.10, 0.05]
GRIDS = [(5, 6), (3, 9), (1, 1), (7, 1)]
PROCESSOR = ImageProcessorConfig(4, 2, 2, 64, 64 * 64, (0.5, 0.4, 0.45), (0.25, 0.3, 0.27))
IMAGE, TEXT_BEFORE, TEXT_AFTER = 5, [1, 8, 3], [4, 12, 15, 9, 2]
PRUNING = [name for name, method in METHODS.items() if method.image_share is None]
SHAPES = {
    "2B": ModelShape(TowerShape(32, 1280, 16, 5120, 1176, 2), DecoderShape(28, 1536, 12, 2, 128, 8960, 151_936)),
    "7 layers": ModelShape(TowerShape(4, 128, 4, 512, 1176, 2), DecoderShape(7, 128, 4, 2, 32, 384, 60)),
    "windows": ModelShape(TowerShape(6, 128, 4, 344, 1176, 2, 3, 4, (2, 5)), DecoderShape(7, 128, 4, 2, 32, 384, 60)),
    "4 layers": ModelShape(TowerShape(3, 32, 2, 64, 96, 2), DecoderShape(4, 32, 4, 2, 8, 48, 48)),
    "32 layers": ModelShape(TowerShape(24, 64, 4, 128, 1176, 2), DecoderShape(32, 64, 4, 2, 16, 128, 64)),
}
WHOLE_LAYERS = {"fastv": {28: 2, 7: 1, 4: 1, 32: 2}, "pyramiddrop": {28: 7, 7: 1, 4: 1, 32: 8}}  # before the first stage, by depth


@pytest.fixture(scope="session")
def double_model(model: Any) -> Any:
    return copy.deepcopy(model).double()


def pixels_of(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pixels [rows, columns, 4, 96] and entropy [rows, columns, 4] of a made-up picture."""
    patches = preprocess_image(picture(rows, columns, seed), PROCESSOR)
    pixels = torch.from_numpy(patches.pixel_values).reshape(rows, columns, 4, -1)
    return pixels, torch.from_numpy(patches.entropy).reshape(rows, columns, 4)


def run_vision(model: Any, method: Method, schedule: Schedule, pixels: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    vision, _ = pruned_graphs(model, model_shape(model.config), schedule, method.vision, method.language)
    with torch.no_grad():
        embedded = vision(pixels.to(model.dtype), entropy, torch.zeros(pixels.shape[0] * pixels.shape[1], dtype=torch.int32))
    assert embedded.key_bias is None
    return embedded.visual_embeds, embedded.importance, embedded.index


def run_language(model: Any, method: Method, schedule: Schedule, embeds: Tensor, importance: Tensor, budget: int) -> tuple[Tensor, list[int]]:
    """Logits of the last token, and how many tokens each layer's cache holds."""
    _, language = pruned_graphs(model, model_shape(model.config), schedule, method.vision, method.language)
    ids = TEXT_BEFORE + [IMAGE] * len(embeds) + TEXT_AFTER
    caches = [(torch.zeros(1, 2, len(ids), 8, dtype=model.dtype), torch.zeros(1, 2, len(ids), 8, dtype=model.dtype)) for _ in range(4)]
    positions = torch.arange(len(ids)).expand(3, 1, -1)
    columns = torch.arange(len(TEXT_BEFORE), len(TEXT_BEFORE) + len(embeds))
    past = torch.zeros(1, len(schedule.decoder_segments(4)), dtype=torch.long)
    with torch.no_grad():
        logits, _, present, _ = language(
            torch.tensor([ids]), positions, embeds, columns, importance, torch.zeros(budget, dtype=torch.int32), None, past, caches, []
        )
    return logits[0], [int(key.abs().sum((0, 1, 3)).count_nonzero()) for key, _ in present]


def test_names_are_keys_and_controls_come_first() -> None:
    assert [method.name for method in METHODS.values()] == list(METHODS)
    assert list(METHODS)[:4] == ["random", "grid", "attention", "downsample"]
    assert [name for name, method in METHODS.items() if method.exportable] == ["attention", "paper", "fastv", "pyramiddrop"]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("name", PRUNING)
def test_the_budget_is_met_and_used(name: str, size: str, keep: float) -> None:
    shape = SHAPES[size]
    layers = shape.decoder.layers
    whole = WHOLE_LAYERS.get(name, {}).get(layers, 0)
    least = whole / layers + (layers - whole) / layers / 1024
    if keep < least and whole:
        shown = rf"{name} keeps its first {whole} layers whole: average keep 0\.\d+ is the least it can meet"
        with pytest.raises(ScheduleError, match=shown) as error:
            METHODS[name].schedule(shape, keep)
        METHODS[name].schedule(shape, float(str(error.value).split("average keep ")[1].split()[0]))  # what it says can be met
        return
    schedule = METHODS[name].schedule(shape, keep)
    schedule.check(shape)
    assert keep - 1 / 1024 < schedule.average_keep(layers) <= keep
    assert (schedule.stages == ()) is (keep == 1)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "entropyprune"])
def test_a_decoder_of_one_layer_is_refused_or_pruned_before_it(name: str) -> None:
    shape = ModelShape(SHAPES["2B"].tower, DecoderShape(1, 32, 4, 2, 8, 48, 48))
    if name == "entropyprune":
        assert METHODS[name].schedule(shape, 0.5).first_stage is not None
    else:
        with pytest.raises(ScheduleError, match="average keep 1 is the least"):
            METHODS[name].schedule(shape, 0.5)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(("rows", "columns"), GRIDS)
@pytest.mark.parametrize(("name", "keep"), [(name, keep) for name in PRUNING for keep in (1.0, 0.5, 0.3 if name in WHOLE_LAYERS else 0.1)])
def test_counts_are_exact_and_order_is_kept(request: pytest.FixtureRequest, name: str, rows: int, columns: int, keep: float, precision: str) -> None:
    model = request.getfixturevalue("model" if precision == "float32" else "double_model")
    method, tokens = METHODS[name], rows * columns
    schedule = method.schedule(model_shape(model.config), keep)
    pixels, entropy = pixels_of(rows, columns)
    embeds, importance, index = run_vision(model, method, schedule, pixels, entropy)
    count = keep_count(tokens, schedule.keep_at("decoder", 0))
    assert embeds.shape == (count, 32) and importance.shape == index.shape == (count,)
    assert embeds.dtype == model.dtype and importance.dtype == torch.float32 and index.dtype == torch.int64
    assert index.diff().gt(0).all() and index[0] >= 0 and index[-1] < tokens
    assert embeds.isfinite().all() and importance.isfinite().all()
    logits, lengths = run_language(model, method, schedule, embeds, importance, tokens)
    assert logits.isfinite().all()
    text = len(TEXT_BEFORE) + len(TEXT_AFTER)
    assert lengths == [text + keep_count(tokens, schedule.keep_at("decoder", layer)) for layer in range(4)]


@pytest.mark.parametrize("name", PRUNING)
def test_the_same_picture_gives_the_same_survivors(model: Any, name: str) -> None:
    method, shape = METHODS[name], model_shape(model.config)
    schedule = method.schedule(shape, 0.3)
    pixels, entropy = pixels_of(5, 6)
    first = run_vision(model, method, schedule, pixels, entropy)
    run_vision(model, method, schedule, *pixels_of(5, 6, seed=1))
    again = run_vision(model, method, schedule, pixels, entropy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", PRUNING)
def test_a_smaller_budget_counts_from_fewer_tokens(model: Any, name: str) -> None:
    method = METHODS[name]
    schedule = method.schedule(model_shape(model.config), 0.3)
    vision, _ = pruned_graphs(model, model_shape(model.config), schedule, method.vision, method.language)
    with torch.no_grad():
        _, _, index, _ = vision(*pixels_of(5, 6), torch.zeros(15, dtype=torch.int32))
    assert len(index) == (30 if schedule.keep_at("decoder", 0) == 1024 else keep_count(15, schedule.keep_at("decoder", 0)))


@pytest.mark.parametrize("name", ["pixelprune", "evoprune"])
def test_tower_methods_show_the_decoder_exactly_what_leaves_the_tower(model: Any, name: str) -> None:
    schedule = METHODS[name].schedule(model_shape(model.config), 0.3)
    assert schedule.first_stage is None and not schedule.later_stages
    assert schedule.keep_at("tower", 2) == schedule.keep_at("decoder", 0) == 307


@pytest.mark.parametrize("name", PRUNING)
def test_what_blocks_give_to_decoder_layers_follows_its_tokens_and_chooses_none(deepstack_model: Any, name: str) -> None:
    louder = copy.deepcopy(deepstack_model)
    for merger in louder.model.visual.deepstack_merger_list:
        merger.linear_fc2.weight.data *= 1024  # exactly
        merger.linear_fc2.bias.data *= 1024  # exactly
    method = METHODS[name]
    schedule = method.schedule(model_shape(deepstack_model.config), 0.5 if name in WHOLE_LAYERS else 0.2)
    embeds, importance, index = run_vision(deepstack_model, method, schedule, *pixels_of(5, 6))
    loud_embeds, loud_importance, loud_index = run_vision(louder, method, schedule, *pixels_of(5, 6))
    assert index.tolist() == loud_index.tolist() and torch.equal(importance, loud_importance)
    torch.testing.assert_close(embeds * torch.tensor([1.0] * 32 + [1024.0] * 64), loud_embeds)
