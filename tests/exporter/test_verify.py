"""What ``verify`` allows: as much as PyTorch in fp32 loses on that input, and never an engine that computes something else."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support import DECODER_STAGES, picture
from vflow.engines.errors import EngineError
from vflow.engines.manifest import Engine
from vflow.engines.session import Session
from vflow.exporter import verify
from vflow.exporter.build import BuildOptions, build_engine
from vflow.exporter.checkpoint import open_checkpoint
from vflow.exporter.reference import TorchBackend
from vflow.exporter.schedule import Importance, Schedule, Stage
from vflow.exporter.verify import FP32_LOGITS, Finding, VerifyInput, generated_inputs, verify_engine

PROMPT = "how many objects are there ?"
QUANTITY = "logits, pruned, against the PyTorch reference"


@pytest.fixture(scope="module")
def engine(build: Callable[..., Engine], random_checkpoint: Path) -> Engine:
    return build(random_checkpoint, DECODER_STAGES)


@pytest.fixture
def findings(engine: Engine, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Finding]]:
    """``findings(engine)``: by quantity, on two inputs, for an engine that may have been changed; rung (a) is compared with the right one."""
    monkeypatch.setattr(verify, "build_engine", lambda *_, **__: engine)
    inputs = [VerifyInput(picture(6, 5), PROMPT), VerifyInput(picture(4, 4, 1), PROMPT)]

    def run(changed: Engine) -> dict[str, Finding]:
        return {finding.quantity: finding for finding in verify_engine(changed, open_checkpoint(str(random_checkpoint)), inputs)}

    return run


def mutated(engine: Engine, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Engine:
    """A copy whose language graph says something else."""
    shutil.copytree(engine.path, folder)
    model = onnx.load(folder / "language.onnx", load_external_data=False)
    change(model)
    onnx.save(model, folder / "language.onnx")
    return dataclasses.replace(engine, path=folder)


def larger_epsilon(model: onnx.ModelProto) -> None:
    node = [node for node in model.graph.node if node.op_type == "RMSNormalization"][-1]
    next(attribute for attribute in node.attribute if attribute.name == "epsilon").f = 1e-3


def test_a_sound_engine_passes_by_the_least_tolerance(engine: Engine, findings: Callable[..., dict[str, Finding]]) -> None:
    finding = findings(engine)[QUANTITY]
    assert finding.passed and finding.tolerance == FP32_LOGITS and finding.note == ""


def test_a_norm_with_another_epsilon_fails(engine: Engine, tmp_path: Path, findings: Callable[..., dict[str, Finding]]) -> None:
    finding = findings(mutated(engine, tmp_path / "engine", larger_epsilon))[QUANTITY]
    assert not finding.passed
    assert finding.worst > 2 * finding.tolerance


@pytest.mark.parametrize(
    ("differences", "roundings", "passed", "worst"),
    [
        ([5e-5, 9e-5], [0.0, 0.0], True, 1),
        ([5e-5, 4.6e-3], [1e-6, 7.2e-3], True, 1),
        ([5e-5, 7.3e-3], [1e-6, 7.2e-3], False, 1),
        ([2e-4, 3.6e-3], [1e-6, 7.2e-3], False, 0),  # what one input is allowed is no leave for another
        ([5e-5, math.nan], [0.0, 1.0], False, 1),
        ([5e-5, 5e-5], [0.0, math.nan], True, 0),
    ],
)
def test_each_input_is_allowed_its_own_rounding(differences: list[float], roundings: list[float], passed: bool, worst: int) -> None:
    finding = verify._rounding_finding("b", QUANTITY, "fp32", differences, [FP32_LOGITS] * len(differences), roundings)
    assert finding.passed is passed
    assert finding.worst == pytest.approx(differences[worst], nan_ok=True)
    assert finding.tolerance == max(FP32_LOGITS, roundings[worst])
    assert ("1 of 2 inputs" in finding.note) == (max(roundings) > FP32_LOGITS)


def test_nan_fails_wherever_it_is() -> None:
    for differences in ([math.nan, 1e-5, 1e-5], [1e-5, math.nan, 1e-5], [1e-5, 1e-5, math.nan]):
        assert not verify._logits_finding("a", "fp32", QUANTITY, differences, 1.0).passed


def test_survivors_of_equal_importance_are_told_from_wrong_ones(engine: Engine) -> None:
    prepared = Session(engine).prepare(PROMPT, [picture(6, 5)])
    (kept,) = prepared.survivors
    lost = np.setdiff1d(np.arange(30), kept.index)[:2]

    def swapped(*importance: float) -> Any:
        """The two least important survivors replaced, by others of this importance."""
        order = np.argsort(prepared.importance)[:2]
        index, values = kept.index.copy(), prepared.importance.copy()
        index[order], values[order] = lost, importance
        return dataclasses.replace(prepared, survivors=(dataclasses.replace(kept, index=index),), importance=values)

    first, second = np.sort(prepared.importance)[:2].tolist()
    largest = float(prepared.importance.max())
    assert verify.importance_differences(prepared, prepared) == (0.0, None)
    assert verify.importance_differences(swapped(second, first), prepared) == (0.0, 0.0)
    assert verify.importance_differences(swapped(first, second + 0.01 * largest), prepared) == (0.0, pytest.approx(0.01, rel=1e-3))
    assert verify.importance_differences(swapped(first, 2e30), prepared)[1] == math.inf


def test_a_picture_of_one_colour_passes(findings: Callable[..., dict[str, Finding]], engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of its tokens survive is arbitrary: here the engine keeps another one of the same importance as the least of the reference's."""
    prepare = Session.prepare

    def other_survivors(self: Session, *arguments: Any, **options: Any) -> Any:
        prepared = prepare(self, *arguments, **options)
        if not isinstance(self.backend, TorchBackend):
            (kept,) = prepared.survivors
            index = kept.index.copy()
            index[prepared.importance.argmin()] = np.setdiff1d(np.arange(kept.index.max() + 1), kept.index)[0]
            return dataclasses.replace(prepared, survivors=(dataclasses.replace(kept, index=index),))
        return prepared

    monkeypatch.setattr(Session, "prepare", other_survivors)
    found = findings(engine)
    survivors = found["survivors that differ, share"]
    assert survivors.passed and "on 2 of 2 inputs others were kept" in survivors.note
    assert found[QUANTITY].passed


def test_other_survivors_are_not_taken_for_rounding(engine: Engine) -> None:
    session = Session(engine)
    item, other = VerifyInput(picture(6, 5), PROMPT), VerifyInput(picture(6, 5, 3), PROMPT)
    exact = session.prepare(item.prompt, [item.image])
    logits = session.prefill(exact).logits
    assert verify._rounding(session, item, exact, logits + 0.25) == pytest.approx(0.25)
    assert verify._rounding(session, other, exact, logits + 0.25) == 0.0


@pytest.fixture(scope="module")
def sensitive(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The small model with a schedule with which, on ``SENSITIVE``, fp32 loses more than ``FP32_LOGITS``."""
    stages = (Stage("decoder", 0, 157, 24.0), Stage("decoder", 3, 63), Stage("decoder", 4, 60))
    schedule = Schedule(stages, Importance(entropy_weight=0.3690759294479826, vision_layer=-2), guidance_weight=0.23616564672544738)
    return build_engine(open_checkpoint("tiny"), schedule, tmp_path_factory.mktemp("engine") / "engine", BuildOptions("fp32", 256, 64))


SENSITIVE = generated_inputs(7)[6]


def test_a_sensitive_input_is_allowed_what_fp32_loses_on_it(sensitive: Engine) -> None:
    checkpoint = open_checkpoint("tiny")
    exact = verify._in_pytorch(sensitive, verify._load(sensitive, checkpoint).double())
    eager = verify._in_pytorch(sensitive, verify._load(sensitive, checkpoint))
    prepared = exact.prepare(SENSITIVE.prompt, [SENSITIVE.image])
    lost = verify._rounding(eager, SENSITIVE, prepared, exact.prefill(prepared).logits)
    assert FP32_LOGITS < lost < 20 * FP32_LOGITS
    ours = Session(sensitive).prefill(Session(sensitive).prepare(SENSITIVE.prompt, [SENSITIVE.image])).logits
    assert np.abs(ours - exact.prefill(prepared).logits).max() <= lost


def first_epsilon_of_1e_5(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
    next(attribute for attribute in node.attribute if attribute.name == "epsilon").f = 1e-5  # 1e-6 in the model


def scale_off_by_a_thousandth(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    next(attribute for attribute in node.attribute if attribute.name == "scale").f *= 1.001


@pytest.mark.parametrize("change", [first_epsilon_of_1e_5, scale_off_by_a_thousandth])
def test_what_is_more_than_rounding_fails_on_a_sensitive_input(
    sensitive: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[onnx.ModelProto], None]
) -> None:
    monkeypatch.setattr(verify, "build_engine", lambda *_, **__: sensitive)
    found = verify_engine(mutated(sensitive, tmp_path / "engine", change), open_checkpoint("tiny"), [SENSITIVE])
    finding = {finding.quantity: finding for finding in found if finding.rung == "d"}[QUANTITY]
    assert finding.tolerance > FP32_LOGITS and "on 1 of 1 inputs" in finding.note
    assert not finding.passed and finding.worst > 5 * finding.tolerance


def test_importance_that_is_held_leaves_out_what_is_protected() -> None:
    """How many representatives a selection protects is not importance, and 1e30 would hide all that is."""
    assert verify.held_importance(np.array([0.5, 1e30, 0.25, 1e30], np.float32)) == 0.75
    assert verify.held_importance(np.array([1e30], np.float32)) == 0.0


def test_a_bf16_engine_is_compared_with_nothing_and_that_is_said(engine: Engine, findings: Callable[..., dict[str, Finding]]) -> None:
    with pytest.raises(EngineError, match=r"is bf16, which ONNX Runtime does not compute, so nothing compares it yet"):
        findings(dataclasses.replace(engine, precision="bf16"))
