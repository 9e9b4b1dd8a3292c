"""Sessions: the steps agree with one another, requests leave nothing behind, limits are said, and the numbers are the buffers'."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vflow.engines import Engine, EngineError, ImageError, SamplingParams, Session, open_engine
from vflow.engines import answer as answer_module
from vflow.engines import request as request_module
from vflow.engines import session as session_module
from vflow.engines.backends.onnxruntime import OnnxRuntimeBackend
from vflow.engines.request import DEFAULT_MAX_NEW_TOKENS
from vflow.engines.results import stage_counts
from vflow.exporter.schedule import Schedule, Stage

MakeStandin = Callable[..., Path]
TOLERANCE = 1e-5  # float32, three layers: chunks of another size sum in another order


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


SMALL, WIDE = picture(24, 32), picture(56, 40)  # 4 x 3 = 12 and 5 x 7 = 35 visual tokens of 8 x 8 pixels


@pytest.fixture(scope="module")
def session(standin: Engine) -> Session:
    return Session(standin, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def unpruned(make_standin: MakeStandin) -> Session:
    return Session(open_engine(make_standin(schedule=Schedule(), max_text_tokens=400)), provider="cpu", threads=1)


def runtime(session: Session) -> OnnxRuntimeBackend:
    """The session's backend, whose caches a test may look into."""
    assert isinstance(session.backend, OnnxRuntimeBackend)
    return session.backend


def tail(session: Session, prompt: str, images: list[Any], extra: list[int]) -> np.ndarray:
    """Logits after a prompt and ``extra`` tokens, computed in one prefill."""
    prepared = session.prepare(prompt, images)
    length = len(extra)
    positions = np.arange(prepared.next_position, prepared.next_position + length)
    whole = replace(
        prepared,
        input_ids=np.concatenate([prepared.input_ids, extra]),
        position_ids=np.concatenate([prepared.position_ids, np.tile(positions, (3, 1))], axis=1),
        next_position=prepared.next_position + length,
    )
    return session.prefill(whole).logits


@pytest.mark.parametrize("images", [[], [SMALL], [SMALL, SMALL]], ids=["text", "image", "images"])
@pytest.mark.parametrize("which", ["session", "unpruned"])
def test_decoding_and_extending_equal_one_prefill(request: pytest.FixtureRequest, which: str, images: list[Any]) -> None:
    session: Session = request.getfixturevalue(which)
    extra = [40, 50, 60, 70]
    expected = tail(session, "hello", images, extra)
    session.prefill(session.prepare("hello", images))
    for token in extra:
        decoded = session.decode(token)
    np.testing.assert_allclose(decoded.logits, expected, atol=TOLERANCE)
    session.prefill(session.prepare("hello", images))
    np.testing.assert_allclose(session.extend(extra).logits, expected, atol=TOLERANCE)
    session.prefill(session.prepare("hello", images))
    session.extend(extra[:3])
    np.testing.assert_allclose(session.decode(extra[3]).logits, expected, atol=TOLERANCE)


def test_survivors_are_the_most_important_tokens_of_each_image(session: Session, unpruned: Session) -> None:
    whole, pruned = (s.prepare("x", [SMALL, picture(24, 24, 1)]) for s in (unpruned, session))
    start = 0
    for image, kept in zip(whole.survivors, pruned.survivors, strict=True):
        importance = whole.importance[start : start + image.index.size]
        start += image.index.size
        best = np.sort(np.argsort(-importance, kind="stable")[: -(-image.index.size // 2)])
        np.testing.assert_array_equal(kept.index, best)
    assert pruned.visual_tokens == whole.visual_tokens == 21
    assert [image.index.size for image in pruned.survivors] == [6, 5]


def test_prepared_requests_have_the_shapes_of_the_contract(session: Session) -> None:
    prepared = session.prepare("hi", [SMALL, SMALL])
    visual = prepared.visual_positions
    assert prepared.input_ids.shape == (prepared.position_ids.shape[1],)
    assert (prepared.input_ids[visual] == session.engine.tokens.image).all() and visual.size == 12
    assert prepared.visual_embeds.shape == (12, 16) and prepared.importance.shape == (12,)
    columns = prepared.position_ids[2, visual[:6]] - prepared.position_ids[0, visual[0]]
    np.testing.assert_array_equal(columns, prepared.survivors[0].index % 3)


def test_repeated_calls_with_other_sizes_do_not_see_each_other(session: Session) -> None:
    first = session.generate("hello", [SMALL], max_new_tokens=8)
    others = [session.generate("other", [WIDE], max_new_tokens=8), session.generate("text", max_new_tokens=8)]
    again = session.generate("hello", [SMALL], max_new_tokens=8)
    assert again.token_ids == first.token_ids and again.text == first.text
    assert {result.visual_tokens for result in others} == {35, 0}


def test_the_images_change_the_answer_and_so_does_their_order(session: Session) -> None:
    a, b = SMALL, picture(24, 32, 7)
    logits = [session.prefill(session.prepare("x", images)).logits for images in ([a, b], [b, a], [a, a])]
    assert min(np.abs(logits[0] - other).max() for other in logits[1:]) > 1e-3


def test_streamed_pieces_are_the_text(session: Session) -> None:
    pieces: list[str] = []
    result = session.generate("hello", [SMALL], max_new_tokens=30, on_text=pieces.append)
    assert "".join(pieces) == result.text and len(pieces) > 3
    assert result.text == session.encoder.decode([t for t in result.token_ids if t not in session.engine.tokens.stop])


def test_a_stop_token_ends_the_answer_and_is_not_shown(make_standin: MakeStandin, edit_manifest: Callable[..., None], session: Session) -> None:
    usual = session.generate("hello", [SMALL], max_new_tokens=8)
    place = next(i for i in range(2, 8) if usual.token_ids[i] not in usual.token_ids[:i])
    folder = make_standin()
    edit_manifest(folder, lambda m: m["tokens"].update(stop=[usual.token_ids[place]]))
    result = Session(open_engine(folder), threads=1).generate("hello", [SMALL], max_new_tokens=8)
    assert result.token_ids == usual.token_ids[: place + 1] and result.finish_reason == "stop"
    assert result.text == session.encoder.decode(usual.token_ids[:place])


def test_length_ends_an_answer_without_a_stop_token(session: Session) -> None:
    result = session.generate("hello", max_new_tokens=3)
    assert len(result.token_ids) == 3 and result.finish_reason == "length" and result.tokens_per_s
    assert session.generate("hello", max_new_tokens=1).tokens_per_s is None


def test_without_a_wish_the_answer_is_as_long_as_there_is_room(session: Session, unpruned: Session) -> None:
    result = session.generate("hello")
    assert result.finish_reason == "stop" or session.room == 0
    assert len(unpruned.generate("hello").token_ids) <= DEFAULT_MAX_NEW_TOKENS


def test_sampling_repeats_with_its_seed(session: Session) -> None:
    answers = [session.generate("hello", max_new_tokens=12, sampling=SamplingParams(temperature=2.0, seed=seed)).token_ids for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_stages_and_bytes_are_those_of_the_schedule_and_the_buffers(session: Session) -> None:
    result = session.generate("hello", [SMALL, picture(24, 24)], max_new_tokens=2)
    assert [(s.part, s.layer, s.kept) for s in result.stages] == [("decoder", 0, 11), ("decoder", 2, 6)]
    assert result.visual_tokens_kept == 6
    assert [stage.kept for stage in stage_counts(session.engine, (9, 9))] == [5 + 5, 5]  # rounded up image by image, later all together
    token = 2 * 2 * 8 * 4  # key and value, heads, width, bytes
    assert result.kv_bytes.allocated == sum(v.numpy().nbytes for v in runtime(session)._caches.values()) == token * (180 + 180 + 170)
    assert result.kv_bytes.visual == token * (20 + 20 + 10) and result.kv_bytes.visual_unpruned == token * 3 * 40
    values = json.loads(json.dumps(result.to_dict()))
    assert values["visual_tokens"] == {
        "input": 21,
        "per_stage": [{"part": "decoder", "layer": 0, "kept": 11}, {"part": "decoder", "layer": 2, "kept": 6}],
    }
    assert 0 < values["vision_s"] < values["ttft_s"] and values["prefill_s"] < values["ttft_s"]


def test_cache_lengths_follow_the_stages(session: Session) -> None:
    prepared = session.prepare("hello", [SMALL, picture(24, 24)])
    session.prefill(prepared)
    text = prepared.input_ids.size - 11
    for layer, visual in ((0, 11), (1, 11), (2, 6)):
        session.backend.clear_caches()
        session.prefill(prepared)
        filled = np.abs(runtime(session).cache_array(layer, "key")).sum(axis=(0, 1, 3)).nonzero()[0]
        assert filled.tolist() == list(range(text + visual))
    assert session.room == min(180 - text - 11, 170 - text - 6)


def test_a_smaller_budget_spends_less_and_stays_consistent(session: Session) -> None:
    result = session.generate("hello", [WIDE], max_new_tokens=4, keep_scale=0.3)
    assert [s.kept for s in result.stages] == [6, 3]  # of ceil(35 · 0.3) = 11
    assert [s.kept for s in session.generate("hello", [WIDE], max_new_tokens=1, keep_scale=1e-9).stages] == [1, 1]
    for wrong in (0, -1, 1.5, float("nan")):
        with pytest.raises(EngineError, match="keep_scale must be in"):
            session.generate("hello", [WIDE], keep_scale=wrong)


def test_a_share_that_is_a_whole_number_of_tokens_is_not_rounded_up(session: Session) -> None:
    share = 0.28  # of 25 tokens, 7; as a product of floats a little more
    assert 25 * share > 7
    assert session.prepare("hello", [picture(40, 40)], keep_scale=share).budgets == (7,)


def test_more_visual_tokens_than_built_are_refused(session: Session) -> None:
    with pytest.raises(EngineError, match=r"max_visual_tokens 40 built, image has 64; resize .*--max-visual-tokens"):
        session.generate("hello", [picture(64, 64)])
    with pytest.raises(EngineError, match="images have 47 together"):
        session.generate("hello", [SMALL, WIDE])
    assert session.generate("hello", [picture(64, 64)], max_pixels=48 * 48, max_new_tokens=1).visual_tokens == 36
    with pytest.raises(EngineError, match="max_pixels must be at least 256"):
        session.generate("hello", [SMALL], max_pixels=10)


def test_prompts_and_answers_longer_than_built_are_refused(session: Session) -> None:
    with pytest.raises(EngineError, match=r"prompt has \d+ text tokens, the engine was built for 160; shorten it"):
        session.generate("x" * 200)
    with pytest.raises(EngineError, match=r"max_new_tokens 500 is more than the \d+ for which there is room"):
        session.generate("hello", max_new_tokens=500)
    for wrong in (0, 2.5, True, "3"):
        with pytest.raises(EngineError, match="max_new_tokens must be a whole number of at least 1"):
            session.generate("hello", max_new_tokens=wrong)  # type: ignore[arg-type]


def test_the_caches_can_be_filled_to_the_last_place(session: Session, unpruned: Session) -> None:
    prepared = unpruned.prepare("hello", [WIDE])
    unpruned.prefill(prepared)
    most = unpruned.room + 1
    assert len(unpruned.generate("hello", [WIDE], max_new_tokens=most).token_ids) <= most
    unpruned.prefill(prepared)
    unpruned.extend([40] * unpruned.room)
    assert unpruned.room == 0
    with pytest.raises(EngineError, match="room for 0 more tokens, not 1"):
        unpruned.decode(40)
    with pytest.raises(EngineError, match=f"max_new_tokens {most + 1} is more than the {most}"):
        unpruned.generate("hello", [WIDE], max_new_tokens=most + 1)
    with pytest.raises(EngineError, match=f"max_new_tokens {most + 1} is more than the {most}"):  # nothing drops tokens, whatever the budget
        unpruned.generate("hello", [WIDE], max_new_tokens=most + 1, keep_scale=0.5)


def test_a_refused_request_leaves_the_session_usable(session: Session, tmp_path: Path) -> None:
    before = session.generate("hello", [SMALL], max_new_tokens=5).token_ids
    with pytest.raises(ImageError, match="no such file"):
        session.generate("hello", [tmp_path / "none.png"])
    with pytest.raises(EngineError, match="image placeholders"):
        session.generate([{"role": "user", "content": "hello"}], [SMALL])
    assert session.generate("hello", [SMALL], max_new_tokens=5).token_ids == before


def test_files_pillow_images_and_arrays_are_the_same_to_it(session: Session, tmp_path: Path) -> None:
    Image.fromarray(SMALL).save(tmp_path / "small.png")
    sources: list[Any] = [SMALL, Image.fromarray(SMALL), tmp_path / "small.png", str(tmp_path / "small.png")]
    assert len({session.generate("hello", [source], max_new_tokens=6).token_ids for source in sources}) == 1


def test_steps_out_of_order_are_refused(standin: Engine) -> None:
    session = Session(standin, threads=1)
    with pytest.raises(EngineError, match="call prefill first"):
        session.decode(1)
    session.prefill(session.prepare("hello"))
    with pytest.raises(EngineError, match="at least one token"):
        session.extend([])


def test_after_a_prefill_that_failed_there_is_nothing_to_continue(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = session.prepare("hello")
    session.prefill(prepared)
    monkeypatch.setattr(session.backend, "language", lambda **inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.prefill(prepared)
    monkeypatch.undo()
    with pytest.raises(EngineError, match="call prefill first"):
        session.decode(1)


def test_an_image_token_in_an_answer_is_text(session: Session) -> None:
    session.prefill(session.prepare("hello", [SMALL]))
    assert np.isfinite(session.decode(session.engine.tokens.image).logits).all()


def test_an_abandoned_stream_does_not_disturb_the_next_request(session: Session) -> None:
    expected = session.generate("other", max_new_tokens=6).token_ids
    abandoned = session.stream("hello", max_new_tokens=50)
    next(abandoned)
    assert session.generate("other", max_new_tokens=6).token_ids == expected
    with pytest.raises(EngineError, match="another request was started"):
        list(abandoned)


def test_logits_that_overflow_do_not_poison_the_next_request(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = session.generate("hello", max_new_tokens=4).token_ids
    vision = session.backend.vision
    monkeypatch.setattr(session.backend, "vision", lambda *inputs: vision(*inputs)._replace(visual_embeds=np.full_like(vision(*inputs)[0], np.nan)))
    with pytest.raises(EngineError, match="not finite"):
        session.generate("hello", [SMALL])
    assert np.isnan(session.prefill(session.prepare("hello", [SMALL])).logits).any()  # step by step nobody chooses a token
    monkeypatch.undo()
    assert session.generate("hello", max_new_tokens=4).token_ids == expected


def test_half_precision_answers(make_standin: MakeStandin) -> None:
    session = Session(open_engine(make_standin(precision="fp16")), threads=1)
    result = session.generate("hello", [SMALL], max_new_tokens=4)
    assert len(result.token_ids) == 4 and result.kv_bytes.allocated == 2 * 2 * 8 * 2 * (180 + 180 + 170)


@pytest.mark.parametrize(
    ("stages", "lengths"),
    [((Stage("decoder", 1, 512),), [1024, 512]), ((Stage("decoder", 0, 300), Stage("decoder", 1, 300), Stage("decoder", 2, 1)), [300, 300, 1])],
)
def test_schedules_of_other_shapes_run(make_standin: MakeStandin, stages: tuple[Stage, ...], lengths: list[int]) -> None:
    session = Session(open_engine(make_standin(schedule=Schedule(stages=stages))), threads=1)
    assert [segment.keep for segment in session.engine.segments] == lengths
    expected = tail(session, "hello", [SMALL, SMALL], [40, 50])
    session.prefill(session.prepare("hello", [SMALL, SMALL]))
    session.decode(40)
    np.testing.assert_allclose(session.decode(50).logits, expected, atol=TOLERANCE)


def test_neither_torch_nor_transformers_is_needed(standin: Engine, tmp_path: Path) -> None:
    Image.fromarray(SMALL).save(tmp_path / "small.png")
    script = (
        "import importlib, pkgutil, sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'torchvision', 'safetensors', 'huggingface_hub'): sys.modules[name] = None\n"
        "import vflow.engines\n"
        "assert not {'onnxruntime', 'tokenizers'} & set(sys.modules)\n"
        "for module in pkgutil.walk_packages(vflow.engines.__path__, 'vflow.engines.'): importlib.import_module(module.name)\n"
        "from vflow.engines import Session, open_engine\n"
        "print(len(Session(open_engine(sys.argv[1]), threads=1).generate('hello', [sys.argv[2]], max_new_tokens=3).token_ids))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(standin.path), str(tmp_path / "small.png")], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": "picture.png"}, "images must be a list of images, got str; put a single one into a list"),
        ({"images": b"PNG"}, "images must be a list of images, got bytes"),
        ({"images": SMALL}, "images must be a list of images, got ndarray"),
        ({"images": None}, "images must be a list of images, got NoneType"),
        ({"images": iter([SMALL])}, "images must be a list of images, got"),
        ({"sampling": {"temperature": 1}}, "sampling must be SamplingParams, got dict"),
        ({"keep_scale": "1"}, "keep_scale must be in .0, 1., got '1'"),
        ({"keep_scale": float("nan")}, "keep_scale must be in"),
        ({"max_pixels": "900"}, "max_pixels must be at least"),
        ({"max_pixels": float("nan")}, "max_pixels must be at least"),
        ({"max_pixels": 900.5}, "and a whole number, got 900.5"),
        ({"stop": "abc"}, "stop must be a list of strings"),
        ({"stop": [1]}, "stop must be a list of strings"),
        ({"stop": [""]}, "none of them empty"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused_before_any_work(session: Session, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        session.generate("hello", **arguments)


def test_stops_may_come_from_a_generator(session: Session) -> None:
    text = session.generate("hello", max_new_tokens=12).text
    stop = text[len(text) // 2]
    stopped = session.generate("hello", max_new_tokens=12, stop=(letter for letter in stop))  # type: ignore[arg-type]
    assert stopped.text == text[: text.index(stop)]


def test_times_are_of_the_parts_that_they_name(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves a second where a part begins to work, and nowhere else."""
    now = [0.0]

    def slow(name: str, seconds: float, of: Any) -> None:
        fast = getattr(of, name)

        def call(*arguments: Any, **named: Any) -> Any:
            now[0] += seconds
            return fast(*arguments, **named)

        monkeypatch.setattr(of, name, call)

    for module in (session_module, request_module, answer_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    slow("load_image", 1.0, request_module)
    slow("vision", 2.0, session.backend)
    slow("language", 4.0, session.backend)
    result = session.generate("hello", [SMALL], max_new_tokens=3)
    assert (result.vision_s, result.prefill_s, result.ttft_s, result.tokens_per_s) == (3.0, 4.0, 7.0, 2 / 8.0)
