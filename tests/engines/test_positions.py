"""M-RoPE position ids: Hugging Face's where nothing is pruned, and the original places where something is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vflow.engines.positions import ImageSurvivors, prompt_positions, text_positions

IMAGE, TEXT = 5, 9
grids = st.tuples(st.integers(1, 7), st.integers(1, 7))


def layout(lengths: list[int], images: list[ImageSurvivors]) -> np.ndarray:
    """Text runs of ``lengths`` around the images' tokens."""
    tokens = [TEXT] * lengths[0]
    for image, length in zip(images, lengths[1:], strict=True):
        tokens += [IMAGE] * image.index.size + [TEXT] * length
    return np.array(tokens, np.int64)


@st.composite
def prompts(draw: st.DrawFn, pruned: bool) -> tuple[np.ndarray, list[ImageSurvivors]]:
    images = []
    for rows, columns in draw(st.lists(grids, max_size=3)):
        index = np.arange(rows * columns)
        if pruned:
            index = np.array(sorted(draw(st.sets(st.sampled_from(index.tolist()), min_size=1))), np.int64)
        images.append(ImageSurvivors(rows, columns, index))
    lengths = draw(st.lists(st.integers(1, 6), min_size=len(images) + 1, max_size=len(images) + 1))
    return layout(lengths, images), images


@pytest.fixture(scope="module")
def huggingface_model() -> Any:
    """A Qwen2-VL of nothing but a configuration: only ``get_rope_index`` is called."""
    from types import SimpleNamespace

    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    model = Qwen2VLModel.__new__(Qwen2VLModel)
    model.__dict__["config"] = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    return model


@settings(max_examples=40, deadline=None)
@given(prompts(pruned=False))
def test_unpruned_prompt_has_hugging_faces_positions(huggingface_model: Any, prompt: tuple[np.ndarray, list[ImageSurvivors]]) -> None:
    import torch

    tokens, images = prompt
    grid_thw = torch.tensor([[1, 2 * image.rows, 2 * image.columns] for image in images]) if images else None
    expected, delta = huggingface_model.get_rope_index(
        torch.tensor(tokens[None]), torch.tensor((tokens == IMAGE).astype(np.int32)[None]), image_grid_thw=grid_thw
    )
    positions, next_position = prompt_positions(tokens, images, image_token=IMAGE, renumber_first_stage=False)
    np.testing.assert_array_equal(positions, expected[:, 0].numpy())
    assert next_position == tokens.size + int(delta)


@settings(max_examples=60, deadline=None)
@given(prompts(pruned=True))
def test_survivors_and_text_keep_the_positions_of_the_unpruned_prompt(prompt: tuple[np.ndarray, list[ImageSurvivors]]) -> None:
    tokens, images = prompt
    positions, next_position = prompt_positions(tokens, images, image_token=IMAGE, renumber_first_stage=False)

    whole = [ImageSurvivors(image.rows, image.columns, np.arange(image.rows * image.columns)) for image in images]
    runs = np.split(tokens, np.flatnonzero(np.diff(tokens == IMAGE)) + 1)
    whole_tokens, keep, number = [], [], 0
    for run in runs:
        if run[0] == IMAGE:
            count, alive = whole[number].index.size, np.isin(whole[number].index, images[number].index)
            number += 1
        else:
            count, alive = run.size, np.ones(run.size, bool)
        whole_tokens += [run[0]] * count
        keep.append(alive)
    unpruned, unpruned_next = prompt_positions(np.array(whole_tokens), whole, image_token=IMAGE, renumber_first_stage=False)
    np.testing.assert_array_equal(positions, unpruned[:, np.concatenate(keep)])
    assert next_position == unpruned_next == positions.max() + 1  # prompts here end in text


@settings(max_examples=40, deadline=None)
@given(prompts(pruned=True))
def test_renumbered_survivors_count_on_like_text(prompt: tuple[np.ndarray, list[ImageSurvivors]]) -> None:
    tokens, images = prompt
    positions, next_position = prompt_positions(tokens, images, image_token=IMAGE, renumber_first_stage=True)
    np.testing.assert_array_equal(positions, text_positions(0, tokens.size))
    assert next_position == tokens.size


def test_one_row_and_column_of_a_pruned_image() -> None:
    image = ImageSurvivors(rows=2, columns=3, index=np.array([1, 5]))
    positions, next_position = prompt_positions(np.array([TEXT, IMAGE, IMAGE, TEXT]), [image], image_token=IMAGE, renumber_first_stage=False)
    assert positions.tolist() == [[0, 1, 1, 4], [0, 1, 2, 4], [0, 2, 3, 4]]
    assert next_position == 5


def test_survivors_that_do_not_match_the_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="2 image tokens, its images have 1"):
        prompt_positions(np.array([IMAGE, IMAGE]), [ImageSurvivors(1, 2, np.array([0]))], image_token=IMAGE, renumber_first_stage=False)


def test_index_outside_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.5"):
        ImageSurvivors(2, 3, np.array([6]))
