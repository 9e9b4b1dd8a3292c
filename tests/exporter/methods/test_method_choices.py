"""One idea of each method that its survivors show."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from vflow.exporter.budget import spend_keep
from vflow.exporter.methods import METHODS
from vflow.exporter.methods.divprune import diverse_places
from vflow.exporter.methods.entropyprune import collapse_layer, matrix_entropy, token_entropy
from vflow.exporter.methods.evoprune import EvoPruneVision, token_value
from vflow.exporter.methods.fastv import FASTV
from vflow.exporter.methods.lrcp import background_residual
from vflow.exporter.methods.lvtp import LvtpVision, entropy_weights, sobel_strength
from vflow.exporter.methods.pixelprune import drop_thresholds
from vflow.exporter.methods.pyramiddrop import PYRAMIDDROP
from vflow.exporter.methods.random_choice import RandomVision
from vflow.exporter.methods.visionzip import VisionZipVision, zip_tokens
from vflow.exporter.model import pruned_graphs
from vflow.exporter.models import LanguageGraph, TowerState, VisionGraph, model_shape
from vflow.exporter.presets import preset_schedule
from vflow.exporter.schedule import Schedule, ScheduleError, Stage
from vflow.exporter.shape import DecoderShape, ModelShape, TowerShape

SHAPE = ModelShape(TowerShape(32, 1280, 16, 5120, 1176, 2), DecoderShape(28, 1536, 12, 2, 128, 8960, 151_936))  # Qwen2-VL-2B
HALF = Schedule(stages=(Stage("decoder", 0, 512),))


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def graph(kind: type[VisionGraph], model: Any, schedule: Schedule = HALF) -> Any:
    return kind(model.model.visual, model_shape(model.config), schedule)


def state_of(importance: Tensor, hidden: Tensor, **values: Any) -> TowerState:
    """A row of tokens with these importances."""
    count, blank = len(importance), torch.zeros(0)
    return TowerState(hidden, blank, blank, values.pop("entropy", None), importance, torch.arange(count), 1, count, count, **values)


def test_random_is_a_draw_of_its_own_for_each_picture_and_not_the_top(model: Any) -> None:
    vision, chosen = graph(RandomVision, model), torch.zeros(12)
    for seed in range(200):
        state = vision.begin(normal(3, 4, 4, 96, seed=seed), None, 12)
        assert torch.equal(vision.score(torch.zeros(0), torch.zeros(0), state), state.importance)  # attention has no say
        _, _, kept, _ = vision.compact(HALF.stages[0], state.hidden[:12], state, final=True)
        chosen[kept] += 1
    assert chosen.sum() == 200 * 6
    assert (chosen - 100).abs().max() < 30  # four deviations of a fair draw


def test_vflowopt_is_the_published_preset_with_its_cells() -> None:
    schedule = METHODS["paper"].schedule(SHAPE, 0.1)
    assert schedule == preset_schedule("paper", SHAPE, 0.1)
    assert schedule.first_stage is not None and schedule.first_stage.recycle == pytest.approx(17.4)
    assert schedule.importance.global_threshold == pytest.approx(39.3)


def test_fastv_stands_at_a_sixteenth_and_spends_the_rest_there() -> None:
    (stage,) = METHODS["fastv"].schedule(SHAPE, 0.5).stages
    assert (stage.part, stage.layer) == ("decoder", 2)
    assert stage.keep == math.floor((0.5 * 28 - 2) / 26 * 1024)


@pytest.mark.parametrize("method", [FASTV, PYRAMIDDROP])
def test_fastv_and_pyramiddrop_rank_by_the_last_token_s_attention_alone(model: Any, method: Any) -> None:
    shape, seen = model_shape(model.config), []
    schedule = method.schedule(shape, 0.6)

    class Watched(LanguageGraph):
        def rank(self, layer: int, hidden: Tensor, ranking: Tensor, query: Tensor, key: Tensor) -> Tensor:
            ranked = super().rank(layer, hidden, ranking, query, key)
            seen.append((layer, ranking < float("inf"), query[0], key[0], ranked))
            return ranked

    _, language = pruned_graphs(model, shape, schedule, language=Watched)
    ids = torch.tensor([[1, 8, *[5] * 12, 4, 12, 9]])
    past = torch.zeros(1, len(schedule.decoder_segments(4)), dtype=torch.long)
    caches = [(torch.zeros(1, 2, 17, 8), torch.zeros(1, 2, 17, 8)) for _ in range(4)]
    with torch.no_grad():
        language(
            ids, torch.arange(17).expand(3, 1, -1), normal(12, 32), torch.arange(2, 14), normal(12, seed=1), torch.zeros(12), None, past, caches, []
        )
    assert [layer for layer, *_ in seen] == [stage.layer for stage in schedule.stages]
    for _, visual, query, key, ranked in seen:
        for_head = [torch.softmax(key[head // 2][visual] @ query[head, -1] / 8**0.5, 0) for head in range(4)]  # two heads share a key
        torch.testing.assert_close(ranked[visual], torch.stack(for_head).mean(0), rtol=1e-4, atol=1e-6)
        assert ranked[~visual].isinf().all()


@pytest.mark.parametrize("keep", [0.33, 0.469, 0.7])
def test_pyramiddrop_keeps_the_same_share_at_every_quarter(keep: float) -> None:
    schedule = PYRAMIDDROP.schedule(SHAPE, keep)
    assert [stage.layer for stage in schedule.stages] == [7, 14, 21]
    first, second, third = (stage.keep / 1024 for stage in schedule.stages)
    assert second == pytest.approx(first**2, abs=2 / 1024) and third == pytest.approx(first**3, abs=4 / 1024)
    if keep == 0.469:
        assert first == pytest.approx(0.5, abs=2 / 1024)  # the published λ


def test_visionzip_keeps_dominant_tokens_and_means_the_others_by_their_keys(model: Any) -> None:
    importance = torch.tensor([0.0, 9.0, 0.0, 8.0, 0.0, 0.0, 7.0, 6.0, 5.0, 0.0])  # dominant: 1, 3, 6, 7; contextual: 0 of the rest
    token_keys = torch.tensor([[1.0] + [0.0] * 15, [0.0, 1.0] + [0.0] * 14])[[0, 1, 0, 1, 1, 0, 1, 1, 0, 0]]
    features = normal(10, 32)
    vision = graph(VisionZipVision, model)
    key = token_keys.repeat_interleave(4, 0).expand(2, -1, -1)  # [heads, P, head_dim]
    merged, _, kept, _ = vision.compact(HALF.stages[0], features, state_of(importance, features, key=key), final=True)
    assert kept.tolist() == [0, 1, 3, 6, 7]  # 5 survive: 4 dominant, 1 contextual
    torch.testing.assert_close(merged[1:], features[[1, 3, 6, 7]], rtol=0, atol=0)
    torch.testing.assert_close(merged[0], features[[0, 2, 4, 5, 8, 9]].mean(0))


def test_visionzip_splits_as_published_and_merges_by_likeness() -> None:
    importance = torch.arange(200.0)
    kept, slot = zip_tokens(importance, torch.nn.functional.one_hot(torch.arange(200) % 10, 10).float(), 64)
    assert (kept >= 146).sum() == 54 and (kept < 146).sum() == 10
    targets = kept[kept < 146]
    assert torch.bincount(slot[kept], minlength=64).eq(1).all()
    likest = targets[(targets[None, :] % 10 == torch.arange(146)[:, None] % 10).int().argmax(1)]
    alike = (targets[None, :] % 10 == torch.arange(146)[:, None] % 10).any(1)
    merged = alike & ~torch.isin(torch.arange(146), targets)
    assert merged.any() and (kept[slot[:146]] % 10 == likest % 10)[merged].all()


def test_divprune_takes_both_of_two_distant_clusters() -> None:
    near, far = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    features = torch.cat([near + 0.01 * normal(9, 3), far + 0.01 * normal(2, 3, seed=1)])
    kept = diverse_places(features, 2)
    assert (kept < 9).sum() == 1 and (kept >= 9).sum() == 1


def test_divprune_s_closest_pair_is_farther_apart_than_by_chance() -> None:
    features = normal(60, 8)
    direction = torch.nn.functional.normalize(features, dim=1)

    def closest(places: Tensor) -> float:
        return float((1 - direction[places] @ direction[places].T).fill_diagonal_(2).min())

    chances = [closest(torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:10]) for seed in range(50)]
    assert closest(diverse_places(features, 10)) > max(chances)


def test_lrcp_keeps_what_the_background_does_not_explain() -> None:
    features = normal(60, 2) @ normal(2, 16, seed=1) * 5 + 50.0  # two dimensions about a mean that is far off
    features[17] = features[17] + normal(16, seed=2)
    residual = background_residual(features)
    assert int(residual.argmax()) == 17
    assert residual[17] > 10 * residual[torch.arange(60) != 17].max()
    assert features.norm(dim=1).argmax() != 17  # and not because it is long


def test_lvtp_protects_edges_that_receive_no_attention(model: Any) -> None:
    importance, edges = torch.arange(12.0), torch.zeros(12)
    edges[2], edges[3] = 5.0, 4.0
    vision, features = graph(LvtpVision, model), normal(12, 32)
    state = state_of(importance, features, entropy=edges.repeat_interleave(4))
    _, _, kept, _ = vision.compact(Stage("decoder", 0, 682), features, state, final=True)
    assert kept.tolist() == [2, 3, 6, 7, 8, 9, 10, 11]  # 8 survive, a quarter of them for their edges
    _, _, kept, _ = vision.compact(Stage("decoder", 0, 682), features, state_of(importance, features, entropy=torch.zeros(48)), final=True)
    assert kept.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]


def test_lvtp_finds_the_edge_in_the_picture() -> None:
    grey = torch.zeros(16, 24)  # 2 × 3 visual tokens of 8 × 8 pixels
    grey[:, 18:] = 1.0  # the edge runs between the first and the second patch of the last column, which begins at pixel 16
    patches = grey.reshape(2, 2, 4, 3, 2, 4).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 4, 1, 1, 16).expand(2, 3, 4, 3, 2, 16).reshape(2, 3, 4, 96)
    strength = sobel_strength(patches, 2).reshape(2, 3, 2, 2)  # rows, columns, patch rows, patch columns
    assert (strength[:, 2, :, 0] == 2.0).all()  # two of four columns with a gradient of 4
    assert strength.sum() == strength[:, 2, :, 0].sum()


def test_lvtp_counts_focused_rows_more_than_those_that_look_everywhere(model: Any) -> None:
    query, key = torch.zeros(2, 16, 16), torch.eye(16).expand(2, -1, -1)  # [heads, P, head_dim]
    query[:, :4, 9] = 40.0  # four patches look at patch 9
    _, weight = entropy_weights(query, key, 1.0)
    assert (weight[:, :4] > 0.9).all() and (weight[:, 4:] < 0.01).all()
    vision = graph(LvtpVision, model)
    score = vision.score(query * 4, key, state_of(torch.zeros(4), torch.zeros(0)))  # its scale is 1/4
    assert int(score.argmax()) == 2  # patch 9 belongs to token 2
    assert score[[0, 1, 3]].max() < 1e-3 * score[2]


def test_lvtp_s_entropy_is_tsallis_of_the_attention_map() -> None:
    query, key = normal(2, 12, 8), normal(2, 12, 8, seed=1)
    attention = torch.softmax(query @ key.transpose(1, 2) * 0.7, -1)
    shares = []
    for q in (0.5, 2.0, 4.0):
        most = (1 - 12 * (1 / 12) ** q) / (q - 1)
        shares.append((1 - attention.pow(q).sum(-1)) / (q - 1) / most)
    _, weight = entropy_weights(query, key, 0.7)
    torch.testing.assert_close(weight, 1 - torch.stack(shares).mean(0), rtol=1e-4, atol=1e-5)


def test_pixelprune_drops_exact_duplicates_first_and_never_the_first_token() -> None:
    pixels = normal(3, 4, 4, 6)
    pixels[0, 2] = pixels[0, 1]  # of the left
    pixels[2, 0] = pixels[1, 0]  # of the upper
    pixels[1, 2] = pixels[1, 1] + 0.01  # nearly
    threshold = drop_thresholds(pixels).flatten()
    assert threshold.argsort()[:2].sort().values.tolist() == [2, 8]
    assert (threshold == 0).sum() == 2
    assert threshold[6] == pytest.approx(0.01, abs=1e-5)
    assert int(threshold.argmax()) == 0


def test_pixelprune_s_duplicates_never_reach_the_tower(model: Any) -> None:
    pixels = normal(4, 6, 4, 96)
    pixels[:, 1::2] = pixels[:, ::2]
    method, shape = METHODS["pixelprune"], model_shape(model.config)
    vision, _ = pruned_graphs(model, shape, method.schedule(shape, 0.5), method.vision, method.language)
    with torch.no_grad():
        _, _, index, _ = vision(pixels, None, torch.zeros(24, dtype=torch.int32))
    assert index.tolist() == list(range(0, 24, 2))


def test_pixelprune_predicts_along_the_edge_and_not_across() -> None:
    """Left of the edge one colour, right of it another: only the first token of each side is needed, and the corner where a side ends."""
    pixels = torch.zeros(3, 4, 4, 6)
    pixels[:, 2:] = 1.0  # an upright edge: below the first row the right side continues its upper neighbour
    assert drop_thresholds(pixels).nonzero().tolist() == [[0, 0], [0, 2]]
    lying = torch.zeros(4, 3, 4, 6)
    lying[2:] = 1.0
    assert drop_thresholds(lying).nonzero().tolist() == [[0, 0], [2, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_pixelprune_s_rank_is_the_least_threshold_of_the_published_rule(seed: int) -> None:
    pixels = torch.randint(0, 4, (4, 5, 1, 2), generator=torch.Generator().manual_seed(seed)).float()

    def far(a: tuple[int, int], b: tuple[int, int]) -> float:
        return float((pixels[a] - pixels[b]).abs().max())

    def is_dropped(row: int, column: int, tau: float) -> bool:
        here, left, upper, corner = (row, column), (row, column - 1), (row - 1, column), (row - 1, column - 1)
        if row == 0 or column == 0:
            return (row, column) != (0, 0) and far(here, left if row == 0 else upper) <= tau
        upright = far(corner, left) <= tau and not far(corner, upper) <= tau
        return far(here, upper if upright else left) <= tau

    for row in range(4):
        for column in range(5):
            least = next((tau for tau in range(4) if is_dropped(row, column, tau)), None)
            assert float(drop_thresholds(pixels)[row, column]) == pytest.approx(1e30 if least is None else least)


def test_evoprune_keeps_the_attended_one_of_two_equal_tokens_and_merges_the_other(model: Any) -> None:
    hidden = torch.eye(6).repeat_interleave(4, 0)  # 6 tokens of 4 patches, [24, 6]
    hidden[12:16] = hidden[4:8]  # token 3 equals token 1
    attention = torch.tensor([1.0, 1.0, 1.1, 1.2, 1.0, 1.0])
    for stronger, kept_one in ((attention, 3), (attention.flip(0)[[0, 2, 1, 4, 3, 5]], 1)):
        vision = graph(EvoPruneVision, model, METHODS["evoprune"].schedule(model_shape(model.config), 0.8))
        features, importance, kept, _ = vision.compact(Stage("tower", 2, 850), hidden.reshape(6, 24), state_of(stronger, hidden))
        assert kept.tolist() == [token for token in range(6) if token != 4 - kept_one]
        torch.testing.assert_close(features, hidden.reshape(6, 24)[kept])  # merged with its equal: unchanged
        assert torch.equal(importance, stronger[kept])


def test_evoprune_merges_into_the_most_similar_by_attention(model: Any) -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.9]]).repeat_interleave(4, 0)
    attention = torch.tensor([2.0, 3.0, 1.0])
    vision = graph(EvoPruneVision, model, METHODS["evoprune"].schedule(model_shape(model.config), 0.8))
    features, _, kept, _ = vision.compact(Stage("tower", 2, 600), hidden.reshape(3, 8), state_of(attention, hidden))
    assert kept.tolist() == [0, 1]
    torch.testing.assert_close(features[1], (3 * hidden[4] + hidden[8]).tile(4) / 4)


def test_evoprune_values_diversity() -> None:
    direction = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [1.0, -0.1]]), dim=1)
    value = token_value(torch.ones(4), direction @ direction.T)
    assert int(value.argmax()) == 2


def test_evoprune_falls_geometrically_from_a_third_of_the_tower() -> None:
    schedule = METHODS["evoprune"].schedule(SHAPE, 0.1)
    assert [stage.layer for stage in schedule.stages] == list(range(10, 32))
    keeps = [1024, *(stage.keep for stage in schedule.stages)]
    assert keeps[-1] == 102
    for before, after in pairwise(keeps):
        assert after / before == pytest.approx((102 / 1024) ** (1 / 22), abs=0.01)


def test_evoprune_refuses_a_tower_without_blocks_to_prune_in() -> None:
    shallow = ModelShape(TowerShape(2, 32, 2, 64, 96, 2), SHAPE.decoder)
    with pytest.raises(ScheduleError, match="from tower block 2 on: this model's tower has 2 blocks"):
        METHODS["evoprune"].schedule(shallow, 0.5)


def test_entropyprune_prefers_states_whose_heads_differ() -> None:
    alike, different = normal(1, 8).expand(4, 8).reshape(1, 32), torch.linalg.qr(normal(8, 8)).Q[:4].reshape(1, 32)
    one, many = token_entropy(torch.cat([alike, different]), 4).tolist()
    assert one == pytest.approx(0.0, abs=1e-4)  # one direction
    assert many == pytest.approx(math.log(4), abs=1e-4)  # four of the same strength


def test_entropyprune_s_two_gram_matrices_have_one_entropy_and_length_does_not_matter() -> None:
    state = normal(3, 6, 5)
    torch.testing.assert_close(matrix_entropy(state), matrix_entropy(state.transpose(1, 2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(matrix_entropy(state), matrix_entropy(100 * state), rtol=1e-4, atol=1e-5)
    assert matrix_entropy(torch.zeros(2, 3, 3)).tolist() == [0.0, 0.0]


def test_entropyprune_ranks_in_the_decoder_and_leaves_text_alone(model: Any) -> None:
    shape = model_shape(model.config)
    method = METHODS["entropyprune"]
    _, language = pruned_graphs(model, shape, method.schedule(shape, 0.5), method.vision, method.language)
    hidden, ranking = normal(1, 5, 32), torch.tensor([float("inf"), 3.0, 2.0, 1.0, float("inf")])
    ranked = language.rank(1, hidden, ranking, torch.zeros(0), torch.zeros(0))
    assert ranked[[0, 4]].isinf().all()
    torch.testing.assert_close(ranked[1:4], token_entropy(hidden[0, 1:4], 4))


def test_entropyprune_moves_to_what_the_budget_can_pay() -> None:
    def deep(layers: int) -> ModelShape:
        return ModelShape(SHAPE.tower, DecoderShape(layers, 64, 4, 2, 16, 128, 64))

    def places(layers: int, keep: float) -> list[tuple[int, int]]:
        return [(stage.layer, stage.keep) for stage in METHODS["entropyprune"].schedule(deep(layers), keep).stages]

    assert places(28, 0.5) == [(1, spend_keep(28, 0.5, (0, 1), lambda number, least, most: most)[1])]
    assert [layer for layer, _ in places(84, 0.5)] == [3]
    assert [layer for layer, _ in places(84, 0.03)] == [2]  # three layers would be 0.036
    assert places(28, 0.03) == [(0, 30)]  # one would be 0.036


@pytest.mark.parametrize("collapse", [1, 3, 4])
def test_the_collapse_layer_is_where_the_states_lose_dimensions(collapse: int) -> None:
    states = []
    for layer in range(6):
        dimensions = 12 - layer if layer < collapse else 4
        states.append(normal(40, dimensions, seed=layer) @ torch.linalg.qr(normal(16, 16)).Q[:dimensions])
    assert collapse_layer(states) == collapse
