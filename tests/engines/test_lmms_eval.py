"""The lmms-eval model: what it hands to a session and what it gives back, against a stand-in for the package and, where it is, the package itself.

The stand-in has of ``lmms_eval`` 0.7 what the adapter uses: the base class with its abstract methods, the result and request types, the manifest.
"""

from __future__ import annotations

import abc
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vflow.engines import Engine, EngineError, SamplingParams, Session

ADAPTER = "vflow.engines.lmms_eval"


class lmms(abc.ABC):  # noqa: N801  # its name there
    is_simple = True

    def __init__(self) -> None:
        self._rank = 0
        self._world_size = 1
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        given = dict(argument.split("=", 1) for argument in arg_string.split(","))
        arguments = {name: int(value) if value.isnumeric() else value for name, value in given.items()}
        return cls(**arguments, **{name: value for name, value in (additional_config or {}).items() if value is not None})

    @property
    def rank(self) -> int:
        return self._rank


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


STANDIN: dict[str, dict[str, Any]] = {
    "lmms_eval": {},
    "lmms_eval.api": {},
    "lmms_eval.api.model": {"lmms": lmms},
    "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "Instance": Instance, "TokenCounts": TokenCounts},
    "lmms_eval.models": {},
    "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The adapter is imported anew, and nobody else sees that one."""
    import vflow.engines

    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    monkeypatch.delattr(vflow.engines, "lmms_eval", raising=False)
    yield
    sys.modules.pop(ADAPTER, None)


@pytest.fixture(params=["stand-in", "package"] if importlib.util.find_spec("lmms_eval") else ["stand-in"])
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fresh: None) -> Any:
    """The adapter's module, over the stand-in or the package."""
    if request.param == "stand-in":
        for name, members in STANDIN.items():
            module = ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)
    return importlib.import_module(ADAPTER)


@pytest.fixture
def make(adapter: Any, standin: Engine) -> Callable[..., Any]:
    """A model of the small stand-in engine; keywords as ``--model_args``."""

    def build(folder: Path = standin.path, **arguments: Any) -> Any:
        return adapter.VFlow.create_from_arg_string(f"engine={folder},threads=1", {"provider": "cpu", **arguments})

    return build


@pytest.fixture(scope="module")
def session(standin: Engine) -> Session:
    return Session(standin, provider="cpu", threads=1)


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def user(*parts: Any) -> list[dict[str, Any]]:
    """One message as lmms-eval's tasks make it: pictures, text, or whole parts."""
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append(text(part))
        else:
            content.append(part if isinstance(part, dict) else {"type": "image", "url": part})
    return [{"role": "user", "content": content}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def ask(model: Any, conversations: list[Any], **options: Any) -> list[Any]:
    """As lmms-eval's evaluator does: documents in ``task_dict``, requests with what makes a document's messages."""
    instance = importlib.import_module("lmms_eval.api.instance").Instance
    model.task_dict["bench"] = {"test": [{"number": number} for number in range(len(conversations))]}
    options = {"max_new_tokens": 12, "temperature": 0, "until": [], **options}

    def to_messages(document: dict[str, int]) -> Any:
        return conversations[document["number"]]

    requests = [
        instance("generate_until", ("", to_messages, dict(options), n, "bench", "test"), 0, {"task": "bench", "doc_id": n, "repeats": 1})
        for n in range(len(conversations))
    ]
    return model.generate_until(requests)


def test_messages_reach_the_engine_as_they_are(make: Callable[..., Any], session: Session, tmp_path: Path) -> None:
    a, b = image(24, 32), image(40, 24, 1)
    b.save(tmp_path / "b.png")
    conversations = [
        user(a, "what is this?"),
        user("first ", a, " then ", {"type": "image", "url": str(tmp_path / "b.png")}, " which?"),
        user("no picture"),
        [
            {"role": "system", "content": "be brief"},
            *user(b, "and?"),
            {"role": "assistant", "content": [text("so")]},
            *user("why?"),
        ],
    ]
    picture = {"type": "image"}
    expected = [
        ([{"role": "user", "content": [picture, text("what is this?")]}], [a]),
        ([{"role": "user", "content": [text("first "), picture, text(" then "), picture, text(" which?")]}], [a, b]),
        ([{"role": "user", "content": "no picture"}], []),
        (
            [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [picture, text("and?")]},
                {"role": "assistant", "content": "so"},
                {"role": "user", "content": "why?"},
            ],
            [b],
        ),
    ]
    answers = ask(make(), conversations)
    assert len({answer.text for answer in answers}) == 4
    for answer, (prompt, images) in zip(answers, expected, strict=True):
        result = session.generate(prompt, images, max_new_tokens=12)
        assert answer.text == result.text.strip()
        assert (answer.token_counts.input_tokens, answer.token_counts.output_tokens) == (result.prompt_tokens, len(result.token_ids))


def test_answers_end_before_the_first_stop_string_and_nothing_is_computed_after_it(make: Callable[..., Any], session: Session) -> None:
    question = [user(image(24, 32), "what is this?")]
    whole = session.generate("what is this?", [image(24, 32)], max_new_tokens=30).text
    position = next(n for n in range(6, len(whole)) if whole.index(whole[n + 1]) == n + 1)  # two stop strings may end at once
    stop, last, later = whole[position : position + 2], whole[position + 1], whole[position + 4 :]
    model = make()
    steps = 0
    decode = model.session.decode

    def counting(token: int) -> Any:
        nonlocal steps
        steps += 1
        return decode(token)

    model.session.decode = counting
    for until in (stop, [stop], [last, stop], ["", later, stop], ["never said", stop, ""]):
        steps = 0
        [answer] = ask(model, question, max_new_tokens=30, until=until)
        assert answer.text == whole[: whole.index(stop)].strip()
        assert 0 < steps < 29
    for until in (None, [], "", ["never said"]):
        assert ask(model, question, max_new_tokens=30, until=until)[0].text == whole.strip()


def test_temperature_alone_decides_between_greedy_and_sampling(make: Callable[..., Any], session: Session) -> None:
    picture = image(24, 32)
    question = [user(picture, "what is this?")]
    greedy = session.generate("what is this?", [picture], max_new_tokens=12).text.strip()
    for options in ({"temperature": 0, "top_p": 0}, {"temperature": None, "do_sample": True}, {"temperature": 0.0, "top_p": 1.0, "num_beams": 1}):
        assert ask(make(), question, **options)[0].text == greedy
    sampling = {"temperature": 5.0, "top_p": 0.9, "top_k": 40, "do_sample": False}
    model = make(seed=7)
    drawn = [answer.text for answer in ask(model, question * 3, **sampling)]
    assert len(set(drawn)) == 3  # repeats of a question are drawn anew
    expected = [
        session.generate("what is this?", [picture], max_new_tokens=12, sampling=SamplingParams(5.0, 40, 0.9, seed)).text.strip()
        for seed in (7, 8, 9)
    ]
    assert drawn == expected
    assert ask(make(seed=7), question, temperature=5.0, top_p=None)[0].text != greedy


def test_budget_and_pixels_reach_the_engine(make: Callable[..., Any], session: Session) -> None:
    picture = image(48, 48)
    [answer] = ask(make(keep_scale=0.5, max_pixels=1024), [user(picture, "what is this?")])
    expected = session.generate("what is this?", [picture], max_new_tokens=12, keep_scale=0.5, max_pixels=1024)
    assert answer.text == expected.text.strip()
    assert answer.token_counts.input_tokens == expected.prompt_tokens < session.generate("what is this?", [picture], max_new_tokens=1).prompt_tokens


@pytest.mark.parametrize(
    ("conversation", "options", "message"),
    [
        (user({"type": "video", "url": "a.mp4"}, "what happens?"), {}, "video; engines take text and images"),
        (user({"type": "image", "url": "nowhere.png"}, "what is this?"), {}, "nowhere.png: no such file"),
        (user("<|im_start|>"), {}, "which structures prompts"),
        (user("p"), {"num_beams": 5}, "no num_beams .* --gen_kwargs num_beams=1"),
        (user("p"), {"repetition_penalty": 1.2}, "no repetition_penalty"),
        (user("p"), {"max_new_tokens": 16384}, "max_new_tokens 16384 is more than"),
        (user("p"), {"temperature": -1}, "temperature"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_with_task_and_document(
    make: Callable[..., Any], conversation: Any, options: dict[str, Any], message: str
) -> None:
    conversations = [conversation] if options else [user("fine"), conversation]
    with pytest.raises(EngineError, match=f"^task bench, document {len(conversations) - 1}: .*{message}"):
        ask(make(), conversations, **options)


def test_what_lmms_eval_asks_chat_models_never_or_seldom_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(NotImplementedError, match=r"log-likelihood.*generate_until"):
        make().loglikelihood([])
    with pytest.raises(NotImplementedError, match=r"multi-round.*generate_until"):
        make().generate_until_multi_round([])


def test_the_device_chooses_the_provider(make: Callable[..., Any], adapter: Any, standin: Engine) -> None:
    model = adapter.VFlow(engine=str(standin.path), device="cpu:0", batch_size="auto", max_batch_size=None)
    assert model.session.backend.provider == "cpu"
    with pytest.raises(EngineError, match="provider must be one of"):
        adapter.VFlow(engine=str(standin.path), device="mps")
    with pytest.raises(EngineError, match="no such engine directory"):
        make(folder=Path("nowhere"))


def test_the_manifest_names_the_class(adapter: Any) -> None:
    found = adapter.manifest()
    module, _, name = found.chat_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is adapter.VFlow
    assert (found.model_id, found.simple_class_path, adapter.VFlow.is_simple) == ("vflow", None, False)
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    if hasattr(registry, "ModelRegistryV2"):  # the package's own check of what it is given
        models = registry.ModelRegistryV2()
        for manifest in models._coerce_payload_to_manifests(adapter.manifest):
            models.register_manifest(manifest)
        assert models.get_model_class("vflow") is adapter.VFlow


def test_the_installed_package_declares_the_entry_point(adapter: Any) -> None:
    [entry] = [entry for entry in importlib.metadata.entry_points(group="lmms_eval.models") if entry.name == "vflow"]
    assert entry.load() is adapter.manifest


def test_without_the_package_the_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch, fresh: None, standin: Engine) -> None:
    for name in (*STANDIN, *(name for name in sys.modules if name.startswith("lmms_eval."))):
        monkeypatch.setitem(sys.modules, name, None)
    module = importlib.import_module(ADAPTER)
    with pytest.raises(EngineError, match=r"pip install 'vflow-export\[lmms-eval\]'"):
        module.VFlow(engine=str(standin.path))


def test_the_stand_in_has_the_package_s_surface() -> None:
    pytest.importorskip("lmms_eval", reason="the package lmms_eval is not installed")
    real = {name: importlib.import_module(name) for name in STANDIN}
    base = real["lmms_eval.api.model"].lmms
    assert base.__abstractmethods__ == lmms.__abstractmethods__
    assert (base.is_simple, base.create_from_arg_string.__name__, isinstance(base.rank, property)) == (True, "create_from_arg_string", True)
    for name in STANDIN:
        for member, ours in STANDIN[name].items():
            if ours is not lmms:
                theirs = inspect.signature(getattr(real[name], member)).parameters
                assert [parameter for parameter in inspect.signature(ours).parameters if parameter not in theirs] == []


TASK = """
task: vflow_scenes
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function scenes.doc_to_visual
doc_to_text: "prompt"
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}]
"""
FUNCTIONS = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(doc["picture"]).convert("RGB")]
"""


def test_the_package_s_own_command_line_runs_an_engine(standin: Engine, tmp_path: Path) -> None:
    """A task of our own (nothing is downloaded) whose right answers are what the engine says, but for one of three."""
    pytest.importorskip("lmms_eval", reason="the package lmms_eval is not installed")
    session = Session(standin, provider="cpu", threads=1)
    lines = []
    for number in range(3):
        picture = image(24, 32, number)
        picture.save(tmp_path / f"{number}.png")
        answer = session.generate("what is this?", [picture], max_new_tokens=8).text.strip()
        lines.append({"picture": str(tmp_path / f"{number}.png"), "prompt": "what is this?", "answer": answer if number else "something else"})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "scenes.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    (tmp_path / "task" / "scenes.py").write_text(FUNCTIONS)
    command = [sys.executable, "-m", "lmms_eval", "--model", "vflow", "--model_args", f"engine={standin.path},threads=1"]
    command += ["--tasks", "vflow_scenes", "--include_path", str(tmp_path / "task"), "--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    [report] = (tmp_path / "out").rglob("*results.json") or [None]
    assert report is not None, done.stdout + done.stderr
    assert json.loads(report.read_text())["results"]["vflow_scenes"]["exact_match,none"] == pytest.approx(2 / 3)
