"""Rung (e) of ``verify``: a target's engines against ONNX Runtime, both behind the same session and on the same inputs.

The graphs themselves are held to the model by the rungs before it (``verify.py``). When engine and graph part, ``bisect`` names the node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx

from ..engines.backends.onnxruntime import OnnxRuntimeBackend
from ..engines.manifest import Engine
from ..engines.session import Session
from .bisection import Parting, RecordingBackend, engine_probe, first_difference, onnxruntime_probe
from .comparison import compare
from .verify import DECODE_STEPS, FP16_IMPORTANCE_RELATIVE, FP16_LOGITS_RELATIVE, FP32_IMPORTANCE_RELATIVE, Finding, VerifyInput, held_importance

__all__ = ["bisect", "verify_target"]

# Of the largest logit, as in the rungs before; in fp32 engines the same operations run in another order on another device, without TF32.
FP32_LOGITS_RELATIVE = 1e-4
# One node after another, of the largest value in each tensor: looser than for the results, since a tensor of small differences of large numbers
# has few of its bits right, and an error that is worth finding is not of the size of rounding.
NODE_SHARE = {"fp32": 1e-3, "fp16": 2e-2}

Progress = Callable[[str, float], None]


def verify_target(session: Session, target: str, inputs: Sequence[VerifyInput], *, progress: Progress = lambda phase, share: None) -> list[Finding]:
    """Compare a session that runs a target's engines with ONNX Runtime: survivors, then logits of a prefill and of each decoding step.

    Both get ONNX Runtime's embeddings and tokens, so that what the vision engine does differently is not counted twice.

    Raises:
        EngineError: Polygraphy is missing, or an engine failed.
    """
    engine = session.engine
    reference = Session(engine, backend=OnnxRuntimeBackend(engine, provider="cpu", standard=True))  # of the graphs that the target was built from
    exact = engine.precision == "fp32"
    share = FP32_LOGITS_RELATIVE if exact else FP16_LOGITS_RELATIVE
    differing, importances, prefills, steps = [], [], [], []
    for number, item in enumerate(inputs):
        progress(f"(e) {target} against ONNX Runtime", number / len(inputs))
        ours, theirs = session.prepare(item.prompt, [item.image]), reference.prepare(item.prompt, [item.image])
        mine, other = ours.survivors[0].index, theirs.survivors[0].index
        differing.append(1 - len(np.intersect1d(mine, other)) / max(len(mine), len(other)))
        mine_held, other_held = held_importance(ours.importance), held_importance(theirs.importance)
        importances.append(abs(mine_held - other_held) / abs(other_held) if other_held else abs(mine_held))
        found, expected = session.prefill(theirs).logits, reference.prefill(theirs).logits
        prefills += compare({"logits": found}, {"logits": expected}, share)
        for _ in range(DECODE_STEPS):
            token = int(expected.argmax())
            token = token if token != engine.tokens.image else 0
            found, expected = session.decode(token).logits, reference.decode(token).logits
            steps += compare({"logits": found}, {"logits": expected}, share)
    selections = 1 + len(engine.schedule.tower_stages)
    allowed = FP32_IMPORTANCE_RELATIVE if exact else FP16_IMPORTANCE_RELATIVE * selections
    findings = [Finding("e", "survivors that differ, share", max(differing), 0.0, max(differing) == 0)] if exact else []
    findings.append(Finding("e", "importance held by the survivors, relative", max(importances), allowed, max(importances) <= allowed))
    for quantity, differences in (("logits of a prefill", prefills), ("logits of decoding steps", steps)):
        worst = max(differences, key=lambda difference: (not difference.passed, difference.worst))
        findings.append(Finding("e", f"{quantity}, {target} against ONNX Runtime", worst.worst, worst.allowed, all(d.passed for d in differences)))
    return findings


def bisect(engine: Engine, target: str, inputs: Sequence[VerifyInput], *, progress: Progress = lambda phase, share: None) -> Parting | None:
    """The first node at which a target's engines part from ONNX Runtime, or ONNX Runtime from itself without any optimisation.

    Looked for in what these inputs make of the vision graph, of a prefill and of one decoding step, in turn; None where nothing parts.

    Raises:
        EngineError: an engine with other outputs cannot be built, or there is no GPU to run it on.
    """
    backend = RecordingBackend(engine)
    session = Session(engine, backend=backend)
    for number, item in enumerate(inputs):
        backend.calls.clear()
        session.prefill(session.prepare(item.prompt, [item.image]))
        session.decode(0)  # any token
        for name, feed in backend.calls:
            progress(f"bisect {name}", number / len(inputs))
            model: Any = onnx.load(engine.path / getattr(engine, name).file, load_external_data=False)
            reference = onnxruntime_probe(model, engine.path, optimized=target != "onnxruntime")
            ours = onnxruntime_probe(model, engine.path) if target == "onnxruntime" else engine_probe(engine, target, name)
            parting = first_difference(name, model, feed, ours, reference, NODE_SHARE[engine.precision])
            if parting is not None:
                return parting
    return None
