"""What TensorRT-LLM is given: the same as our own language graph, enough for a runtime that knows nothing of pruning, in the published form.

TensorRT-LLM could not be installed where this was written; ``tensorrt_llm_standin.py`` says what was read of it. Where it imports, it is held to the
same record.
"""

from __future__ import annotations

import inspect
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_llm_standin as published
from click.testing import CliRunner
from PIL import Image
from support import picture
from vflow.engines import Engine, EngineError, Session, open_engine
from vflow.engines.backends.onnxruntime import OnnxRuntimeBackend
from vflow.engines.tensorrt_llm import Feed, PrunedPrompt, load_llm, register_processor
from vflow.exporter.cli import main
from vflow.exporter.schedule import Importance, Schedule, Stage
from vflow.exporter.weight_files import CheckpointError

LOGITS = 1e-4  # absolute, of logits of up to about 6: the same operations in another order
SCHEDULES = {
    "unpruned": Schedule(),
    "one stage": Schedule((Stage("decoder", 0, 300),)),
    "tower and one stage": Schedule((Stage("tower", 1, 800, 2.5), Stage("tower", 2, 600), Stage("decoder", 0, 300, 2.0)), Importance(1.3, 0.3)),
    "tower alone": Schedule((Stage("tower", 1, 500),)),
    "renumbered": Schedule((Stage("decoder", 0, 400),), renumber_first_stage=True),
}
LATER_TOWER = Schedule((Stage("tower", 2, 600), Stage("decoder", 0, 300, 2.0)))
PROMPT = "how many objects are there ?"
IMAGES = [picture(5, 6, seed=1), picture(3, 4, seed=2)]


@pytest.fixture(scope="module", params=list(SCHEDULES))
def engine(request: pytest.FixtureRequest, build: Callable[..., Engine], random_checkpoint: Path) -> Engine:
    return build(random_checkpoint, SCHEDULES[request.param])


def session_of(engine: Engine) -> Session:
    return Session(engine, provider="cpu", threads=1)


def feed_of(engine: Engine) -> Feed:
    return Feed(engine, provider="cpu", threads=1)


# ------------------------------------------------------------------------------------------------------------- what is made


@pytest.mark.parametrize("options", [{}, {"keep_scale": 0.5}, {"max_pixels": 64 * 12}])
@pytest.mark.parametrize("count", [1, 2])
def test_embeddings_and_positions_are_those_of_our_own_language_graph(engine: Engine, count: int, options: dict[str, Any]) -> None:
    session = session_of(engine)
    prepared = session.prepare(PROMPT, IMAGES[:count], **options)
    pruned = feed_of(engine).inputs(PROMPT, IMAGES[:count], **options)["multi_modal_embeddings"]
    np.testing.assert_array_equal(pruned.embeddings, prepared.visual_embeds)
    np.testing.assert_array_equal(pruned.token_ids, prepared.input_ids)
    np.testing.assert_array_equal(pruned.visual_positions, np.flatnonzero(pruned.token_ids == engine.tokens.image))
    np.testing.assert_array_equal(pruned.position_ids, prepared.position_ids[:, None])


def test_the_position_delta_is_what_our_own_decoding_goes_by(engine: Engine) -> None:
    asked: list[Any] = []

    class Recording(OnnxRuntimeBackend):
        def language(self, **inputs: Any) -> Any:
            asked.append(inputs["position_ids"])
            return super().language(**inputs)

    session = Session(engine, backend=Recording(engine, provider="cpu", threads=1))
    session.prefill(session.prepare(PROMPT, IMAGES))
    session.decode(20)
    session.decode(21)
    pruned = feed_of(engine).inputs(PROMPT, IMAGES)["multi_modal_embeddings"]
    for number, positions in enumerate(asked[1:]):
        assert (positions == pruned.token_ids.size + number + pruned.position_delta).all()


def test_the_text_holds_one_placeholder_an_image(engine: Engine) -> None:
    inputs = feed_of(engine).inputs(PROMPT, IMAGES)
    assert inputs["prompt"].count("<|image_pad|>") == 2 and PROMPT in inputs["prompt"]
    assert set(feed_of(engine).inputs(PROMPT)) == {"prompt"}  # nothing of ours is in a request without images


def test_neither_torch_nor_tensorrt_llm_is_needed_until_tensors_are(make_standin: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_standin(schedule=Schedule((Stage("decoder", 0, 512),)))
    Image.fromarray(picture(4, 4)).save(tmp_path / "small.png")
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'tensorrt_llm'): sys.modules[name] = None\n"
        "from vflow.engines import open_engine\n"
        "from vflow.engines.tensorrt_llm import Feed\n"
        "inputs = Feed(open_engine(sys.argv[1]), provider='cpu', threads=1).inputs('hello', [sys.argv[2]])\n"
        "print(inputs['multi_modal_embeddings'].embeddings.shape[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder), str(tmp_path / "small.png")], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "8"), done.stderr


def test_the_language_graph_is_not_loaded(make_standin: Callable[..., Path]) -> None:
    folder = make_standin(schedule=Schedule((Stage("decoder", 0, 512),)))
    (folder / "language.onnx").write_bytes(b"\xff" * (folder / "language.onnx").stat().st_size)
    assert feed_of(open_engine(folder, check_hashes=False)).inputs("hello", IMAGES[:1])


# ------------------------------------------------------------------------------------------------------------- what comes of it


@pytest.mark.parametrize(("count", "earlier"), [(0, False), (1, False), (2, False), (2, True)])
def test_a_runtime_that_knows_nothing_of_pruning_gives_the_same_answer(
    engine: Engine, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, count: int, earlier: bool
) -> None:
    published.install(monkeypatch, earlier=earlier)
    llm, session = load_llm(engine, random_checkpoint), session_of(engine)
    answer = llm.generate(feed_of(engine).inputs(PROMPT, IMAGES[:count])).outputs[0]
    ours = session.generate(PROMPT, IMAGES[:count], max_new_tokens=llm.max_tokens)
    assert tuple(answer.token_ids) == ours.token_ids
    assert len(ours.token_ids) > 1, "no token was decoded, so the delta was not used"
    expected = session.prefill(session.prepare(PROMPT, IMAGES[:count])).logits
    np.testing.assert_allclose(llm.prefill_logits, expected, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("kind", ["windowed_checkpoint", "deepstack_checkpoint"])
def test_other_families_give_the_same_answer_too(build: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    folder = request.getfixturevalue(kind)
    test_a_runtime_that_knows_nothing_of_pruning_gives_the_same_answer(build(folder, LATER_TOWER), folder, monkeypatch, 2, False)


@pytest.mark.parametrize("change", ["position_ids", "position_delta", "embeddings"])
def test_the_comparison_notices_what_is_wrong(build: Any, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    engine = build(random_checkpoint, SCHEDULES["one stage"])
    published.install(monkeypatch)
    llm = load_llm(engine, random_checkpoint)
    inputs = feed_of(engine).inputs(PROMPT, IMAGES[:1])
    right = list(llm.generate(inputs).outputs[0].token_ids), llm.prefill_logits
    pruned = inputs["multi_modal_embeddings"]
    wrong = {
        "position_ids": pruned.position_ids[:, :, ::-1].copy(),
        "position_delta": pruned.position_delta + 5,
        "embeddings": pruned.embeddings[::-1].copy(),
    }
    answer = llm.generate({**inputs, "multi_modal_embeddings": PrunedPrompt(**{**vars(pruned), change: wrong[change]})}).outputs[0]
    assert list(answer.token_ids) != right[0] or np.abs(llm.prefill_logits - right[1]).max() > 100 * LOGITS


def test_a_batch_mixes_requests_of_all_kinds(build: Any, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(random_checkpoint, SCHEDULES["tower and one stage"])
    published.install(monkeypatch)
    feed, session = feed_of(engine), session_of(engine)
    requests = [(PROMPT, IMAGES), (PROMPT, []), ("what color is the object ?", IMAGES[1:])]
    answers = load_llm(engine, random_checkpoint).generate([feed.inputs(*request) for request in requests])
    assert [tuple(answer.outputs[0].token_ids) for answer in answers] == [session.generate(*r, max_new_tokens=8).token_ids for r in requests]


def test_the_script_in_the_engine_directory_answers(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(IMAGES[0]).save(tmp_path / "picture.png")
    options = ("--model", random_checkpoint, "--keep", 0.3, "--target", "tensorrt-llm", "--output", tmp_path / "engine", "--max-text-tokens", 64)
    built = CliRunner().invoke(main, ["build", *map(str, options)])
    assert built.exit_code == 0, built.output
    published.install(monkeypatch)
    script = tmp_path / "engine" / "tensorrt-llm" / "generate.py"
    assert f"python {script} {random_checkpoint}" in built.output
    monkeypatch.setattr(sys, "argv", ["generate.py", str(random_checkpoint), "--image", str(tmp_path / "picture.png"), "--prompt", PROMPT])
    runpy.run_path(str(script), run_name="__main__")
    expected = session_of(open_engine(tmp_path / "engine")).generate(PROMPT, [IMAGES[0]], max_new_tokens=8)
    assert capsys.readouterr().out.split() == published_text(random_checkpoint, expected.token_ids).split()


def published_text(checkpoint: Path, token_ids: tuple[int, ...]) -> str:
    from transformers import PreTrainedTokenizerFast

    text: str = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json")).decode(token_ids)
    return text


# ------------------------------------------------------------------------------------------------------------- the published API


@pytest.fixture(params=["stand-in", "earlier stand-in", "tensorrt_llm"])
def api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "tensorrt_llm":
        pytest.importorskip("tensorrt_llm._torch.models.modeling_qwen2vl", reason="TensorRT-LLM is not installed", exc_type=ImportError)
    else:
        published.install(monkeypatch, earlier=request.param.startswith("earlier"))
    return request.param


@pytest.mark.parametrize("name", list(published.CONTRACT))
def test_the_api_takes_what_we_give(api: str, name: str) -> None:
    module, path = name.split(":")
    parameters = inspect.signature(reduce(getattr, path.split("."), import_module(module))).parameters
    assert set(published.CONTRACT[name]) <= set(parameters)
    others = [p for key, p in parameters.items() if key not in (*published.CONTRACT[name], "self", "second_per_grid_ts")]
    assert not [p.name for p in others if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def test_reuse_of_blocks_is_on_unless_it_is_turned_off(api: str) -> None:
    config = import_module("tensorrt_llm.llmapi").KvCacheConfig
    assert config().enable_block_reuse is True
    assert config(enable_block_reuse=False).enable_block_reuse is False


def test_positions_have_the_shape_and_dtype_of_its_own_processor(api: str, build: Any, random_checkpoint: Path) -> None:
    import torch

    models = import_module("tensorrt_llm._torch.models.modeling_qwen2vl")
    theirs = object.__new__(models.Qwen2VLInputProcessorBase)
    theirs._config = SimpleNamespace(image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_config=SimpleNamespace(spatial_merge_size=2))
    published.check_mrope_config(theirs.get_mrope_config(torch.ones(1, 7, dtype=torch.int64), None, None, None), 7)

    register_processor("qwen2_vl")
    registry = import_module("tensorrt_llm.inputs.registry")
    table = getattr(registry, "INPUT_PROCESSOR_REGISTRY", None)
    processors = table._input_processors_cls_by_model_type if table else registry.MULTIMODAL_PLACEHOLDER_REGISTRY.processors
    ours = object.__new__(processors[models.Qwen2VLModel])
    inputs = feed_of(build(random_checkpoint, SCHEDULES["one stage"])).inputs(PROMPT, IMAGES)
    token_ids, extra = ours.attach_multimodal_embeddings(inputs, inputs["multi_modal_embeddings"], None)
    published.check_mrope_config(extra["multimodal_data"]["mrope_config"], len(token_ids))
    assert isinstance(ours, models.Qwen2VLInputProcessorBase)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_stages_inside_the_decoder_are_refused_with_what_to_do(standin: Engine) -> None:
    with pytest.raises(EngineError, match=r"one KV length per request.*\(before layers 2\); build with --target tensorrt-llm --keep 0\.417,"):
        Feed(standin)
    with pytest.raises(EngineError, match="one KV length per request"):
        load_llm(standin, "anywhere")


def test_the_decoder_must_be_of_the_model_whose_tower_it_is(
    build: Any, random_checkpoint: Path, untied_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published.install(monkeypatch)
    engine = build(random_checkpoint, SCHEDULES["one stage"])
    with pytest.raises(EngineError, match=f"is not the model of this engine .*{engine.model_fingerprint}"):
        load_llm(engine, untied_checkpoint)
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        load_llm(engine, tmp_path)


def test_a_missing_package_is_said_with_what_to_install(build: Any, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(EngineError, match=r"^TensorRT-LLM cannot be imported \(.*\); pip install 'vflow-export\[tensorrt-llm\]'.*$"):
        load_llm(build(random_checkpoint, SCHEDULES["one stage"]), random_checkpoint)


def test_caches_are_not_shared_between_pictures(build: Any, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published.install(monkeypatch)
    engine = build(random_checkpoint, SCHEDULES["one stage"])
    assert load_llm(engine, random_checkpoint, dtype="auto").kv_cache_config.enable_block_reuse is False
    with pytest.raises(EngineError, match="must have enable_block_reuse=False"):
        load_llm(engine, random_checkpoint, kv_cache_config=published.KvCacheConfig())


def test_without_our_processor_the_embeddings_are_refused(build: Any, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published.install(monkeypatch)
    llm = import_module("tensorrt_llm.llmapi").LLM(str(random_checkpoint))
    with pytest.raises(NotImplementedError):
        llm.generate(feed_of(build(random_checkpoint, SCHEDULES["one stage"])).inputs(PROMPT, IMAGES[:1]))
