"""Optimisation profiles hold every request that the limits allow, and no size inside the graphs is larger than in a profile's corner."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vflow.engines.errors import EngineError
from vflow.engines.graphs import Profile, TensorInfo
from vflow.engines.manifest import Limits, kv_segments
from vflow.engines.preprocess import MAX_ASPECT_RATIO, smart_resize
from vflow.exporter.schedule import Schedule, Stage, keep_count
from vflow.exporter.tensorrt.profiles import language_profiles, vision_profiles

SCHEDULE = Schedule((Stage("decoder", 0, 500), Stage("decoder", 2, 250), Stage("decoder", 3, 7)))


@example(most=293, height=8200, width=41)  # a strip of 200 : 1 that rounding makes 293 : 1
@example(most=1280, height=71, width=14168)
@given(most=st.integers(1, 20_000), height=st.integers(1, 6000), width=st.integers(1, 6000))
def test_every_grid_that_fits_has_a_profile(most: int, height: int, width: int) -> None:
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        return
    rows, columns = (side // 28 for side in smart_resize(height, width, factor=28, min_pixels=28 * 28, max_pixels=most * 28 * 28))
    if rows * columns <= most:
        assert any(profile.admits(rows=rows, columns=columns, budget=rows * columns) for profile in vision_profiles(Limits(most, 1)))


@pytest.mark.parametrize("most", [1, 2, 64, 1280, 16384])
def test_corners_of_image_profiles_stay_near_the_limit(most: int) -> None:
    for profile in vision_profiles(Limits(most, 1)):
        rows, columns = profile.sizes["rows"][2], profile.sizes["columns"][2]
        assert most <= rows * columns <= 9 * most + 9 * most**0.5
        assert profile.sizes["rows"][1] * profile.sizes["columns"][1] == profile.sizes["budget"][1] <= most


@given(visual=st.integers(0, 64), text=st.integers(1, 40), schedule=st.sampled_from([SCHEDULE, Schedule()]))
def test_prefill_holds_every_request_of_one_image_and_none_is_larger_than_its_corner(visual: int, text: int, schedule: Schedule) -> None:
    """``visual`` original tokens: their survivors enter, each segment keeps its share, and its queries are counted as the graph counts them."""
    limits = Limits(64, 40)
    segments = kv_segments(schedule, 4, max_visual_tokens=limits.max_visual_tokens, max_text_tokens=limits.max_text_tokens)
    prefill, decode = language_profiles(segments, limits)
    entering = keep_count(visual, segments[0].keep)
    assert prefill.admits(batch=1, length=entering + text, visual=entering, budget=visual)
    assert decode.admits(batch=1, length=1, visual=0, budget=0)
    assert decode.sizes["length"][1] == 1
    assert not decode.admits(length=3)
    length, most_visual, budget = (prefill.sizes[name][2] for name in ("length", "visual", "budget"))
    for segment in segments:
        queries = entering + text - (entering - keep_count(visual, segment.keep))
        corner = length - (most_visual - keep_count(budget, segment.keep))
        assert queries <= corner == segment.capacity


def test_a_profile_gives_tensors_their_shapes() -> None:
    profile = Profile("p", {"rows": (1, 2, 3), "unused": (0, 0, 0)})
    assert profile.shapes(TensorInfo("x", "float16", ("rows", 4))) == ((1, 4), (2, 4), (3, 4))
    with pytest.raises(EngineError, match="sizes of rows must ascend from 0 on, got 2, 1, 3"):
        Profile("p", {"rows": (2, 1, 3)})
