"""Verify: an engine against the model it was built from, on real inputs, one rung after another.

    (a) the exported graphs with nothing pruned, against the Hugging Face model
    (b) the engine's pruned graphs, against the PyTorch reference with the same schedule: survivors, then logits
    (c) decoding step by step, against the same tokens in one chunk and, where pruning does not depend on the last token, in one prefill
    (d) the graphs of standard operators, against the PyTorch reference as in (b), where others are what runs on the CPU

``verify_target.py`` has (e), the engines of a target against ONNX Runtime. A rung says what it measured and where its tolerance comes from; none is
skipped silently.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..engines.backends.onnxruntime import OnnxRuntimeBackend
from ..engines.errors import EngineError
from ..engines.manifest import Engine
from ..engines.preprocess import load_image, preprocess_image
from ..engines.results import Prepared
from ..engines.session import Session
from .build import PRECISIONS, BuildOptions, build_engine
from .checkpoint import Checkpoint, CheckpointError
from .model import load_model, pruned_graphs
from .models import PROTECTED
from .random_rounding import RandomRounding
from .reference import TorchBackend
from .schedule import unpruned_schedule
from .tiny.scenes import KINDS, samples
from .weights import quantize_model

__all__ = ["Finding", "VerifyInput", "generated_inputs", "held_importance", "verify_engine"]

# fp32: the same operations in another order. What was measured is in docs/quality.md.
FP32_LOGITS = 1e-4
# The reference computes in float64, so that the engine's rounding is measured and not the reference's: on peaked attention (the small model has
# scores of 300) fp32 alone is up to 7e-3 from float64, and fp16 up to 3. No engine can be held to less than its precision achieves with the same
# weights. One run of PyTorch is one sample of that, and an engine is another: where an engine is further off than the tolerance, it may be as far as
# the furthest of ROUNDINGS runs of PyTorch in its precision, the first as it is and the others rounded at random. Larger checkpoints would not fit
# in float64: their reference is of the engine's precision, and the tolerance is all that is allowed.
FLOAT64_LIMIT = 1 << 30  # bytes of the checkpoint
ROUNDINGS = 32
# fp16 carries 11 bits (2⁻¹¹ = 4.9e-4 relative) and every layer rounds anew, in another place in each framework: 1 % of the largest
# logit is twenty roundings. On calm ground many patches are equally important to rounding, and which of them survive is then arbitrary: in fp16
# survivors need not be the same tokens, but must hold as much importance. An attention score of 100 is rounded to 0.06 in fp16, so importances
# carry errors of 5 %; each tower stage is one more selection, after which attention is measured among other tokens.
FP16_LOGITS_RELATIVE = 1e-2
# Two tokens can be equally important to fp32 rounding (2e-6 apart on one of twenty inputs of the small model; in blank pictures all are), and which
# of them a stage keeps is then arbitrary. So importance is compared by itself, the reference's later stages rank by the engine's, and where a first
# stage kept another token of the same importance, logits are compared from the engine's survivors on.
FP32_IMPORTANCE_RELATIVE = 1e-4
FP16_IMPORTANCE_RELATIVE = 5e-2
DECODE_STEPS = 6
VERIFY_SIZES = ((448, 448), (336, 448), (224, 168), (140, 280), (500, 230))  # pixels; the last is resized on the way
VERIFY_SEED = 8_000_000  # held out


@dataclass(frozen=True)
class VerifyInput:
    """An image and a question about it."""

    image: NDArray[np.uint8]
    prompt: str


def generated_inputs(count: int) -> list[VerifyInput]:
    """Questions about generated scenes of five sizes, square and not, in turn; held out from training."""
    chosen = []
    for number in range(count):
        width, height = VERIFY_SIZES[number % len(VERIFY_SIZES)]
        sample = next(samples(seed=VERIFY_SEED + number, count=1, kinds=[list(KINDS)[number % len(KINDS)]], width=width, height=height))
        chosen.append(VerifyInput(sample.image, sample.question.prompt))
    return chosen


@dataclass(frozen=True)
class Finding:
    """One comparison: the largest difference over all inputs and what it may be; where inputs differ in that, those of the worst by its tolerance."""

    rung: str
    quantity: str
    worst: float
    tolerance: float
    passed: bool
    note: str = ""


def verify_engine(
    engine: Engine, checkpoint: Checkpoint, inputs: Sequence[VerifyInput], *, progress: Callable[[str, float], None] = lambda phase, share: None
) -> list[Finding]:
    """Run all rungs.

    Raises:
        CheckpointError: the checkpoint is not the one that the engine was built from.
        EngineError: the engine is bf16.
    """
    if engine.precision == "bf16":
        raise EngineError(f"{engine.path} is bf16, which ONNX Runtime does not compute, so nothing compares it yet; verify the same build in fp16")
    if engine.model_fingerprint != checkpoint.fingerprint:
        raise CheckpointError(f"{checkpoint.name} ({checkpoint.fingerprint}) is not the model of this engine ({engine.model_fingerprint})")
    model = _load(engine, checkpoint)
    with tempfile.TemporaryDirectory(prefix="vflow-verify-") as folder:
        options = BuildOptions(engine.precision, engine.limits.max_visual_tokens, engine.limits.max_text_tokens, weights=engine.weights)
        progress("build unpruned", 0.0)
        unpruned = build_engine(checkpoint, unpruned_schedule(), Path(folder) / "unpruned", options)
        findings = list(_against_hugging_face(Session(unpruned), model, inputs, progress))
    session, reference, eager = Session(engine), _in_pytorch(engine, model), None
    if checkpoint.size <= FLOAT64_LIMIT:
        reference, eager = _in_pytorch(engine, _load(engine, checkpoint).double()), reference
    exact = _Memory(reference)
    findings += _compare("b", "the PyTorch reference", session, exact, inputs, progress, eager)
    findings += _decoding(session, inputs, progress)
    if engine.vision.cpu_file is not None:
        del model, session  # a second engine beside the first need not fit
        standard = Session(engine, backend=OnnxRuntimeBackend(engine, provider="cpu", standard=True))
        findings += _compare("d", "the PyTorch reference", standard, exact, inputs, progress, eager)
    return findings


def _load(engine: Engine, checkpoint: Checkpoint) -> Any:
    """The model with the weights that the engine computes with: what fewer bits cost in answers is for ``evaluate``."""
    model = load_model(checkpoint, PRECISIONS[engine.precision])
    quantize_model(model, engine.weights)
    return model


def _in_pytorch(engine: Engine, model: Any) -> Session:
    return Session(engine, backend=TorchBackend(*pruned_graphs(model, engine.shape, engine.schedule), engine.segments))


def _logits_finding(rung: str, precision: str, quantity: str, differences: Sequence[float], largest: float) -> Finding:
    tolerance = FP32_LOGITS if precision == "fp32" else FP16_LOGITS_RELATIVE * largest
    worst = float(np.max(differences))  # NaN where one of them is, and fails
    return Finding(rung, quantity, worst, tolerance, worst <= tolerance)


def _against_hugging_face(session: Session, model: Any, inputs: Sequence[VerifyInput], progress: Callable[[str, float], None]) -> Iterator[Finding]:
    differences, largest = [], 0.0
    for number, item in enumerate(inputs):
        progress("(a) against Hugging Face", number / len(inputs))
        ours = session.prefill(session.prepare(item.prompt, [item.image])).logits
        theirs = hugging_face_logits(session, model, item)
        differences.append(float(np.abs(ours - theirs).max()))
        largest = max(largest, float(np.abs(theirs).max()))
    yield _logits_finding("a", session.engine.precision, "logits, nothing pruned, against Hugging Face", differences, largest)


@torch.inference_mode()
def hugging_face_logits(session: Session, model: Any, item: VerifyInput) -> NDArray[np.float32]:
    """The Hugging Face model's logits of the last token: its own merging of embeddings, positions and masks."""
    engine = session.engine
    patches = preprocess_image(load_image(item.image), engine.image_processor)
    rows, columns = (side // engine.shape.tower.merge_size for side in patches.grid_thw[1:])
    tokens = session.encoder.encode(item.prompt, 1)
    expanded = [t for token in tokens for t in ([token] * (rows * columns) if token == engine.tokens.image else [token])]
    input_ids = torch.tensor([expanded])
    output = model(
        input_ids=input_ids,
        mm_token_type_ids=(input_ids == engine.tokens.image).int(),
        pixel_values=torch.from_numpy(patches.pixel_values).to(model.dtype),
        image_grid_thw=torch.tensor([patches.grid_thw]),
        use_cache=False,
        logits_to_keep=1,
    )
    logits: NDArray[np.float32] = output.logits[0, -1].float().numpy()
    return logits


class _Memory:
    """The reference and what it has made of each input up to the language graph, since two rungs ask for that."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._prepared: dict[int, Prepared] = {}

    def prepare(self, item: VerifyInput) -> Prepared:
        if id(item) not in self._prepared:
            self._prepared[id(item)] = self.session.prepare(item.prompt, [item.image])
        return self._prepared[id(item)]


def _compare(
    rung: str,
    against: str,
    session: Session,
    reference: _Memory,
    inputs: Sequence[VerifyInput],
    progress: Callable[[str, float], None],
    eager: Session | None,
) -> Iterator[Finding]:
    """A session with another one of the same engine: survivors, what they are ranked by, and logits.

    ``eager``: PyTorch in the engine's precision where the reference is float64.
    """
    precision = session.engine.precision
    shares, held, ranked, differences, tolerances, roundings, ties = [], [], [], [], [], [], 0
    for number, item in enumerate(inputs):
        progress(f"({rung}) against {against}", number / len(inputs))
        ours, theirs = session.prepare(item.prompt, [item.image]), reference.prepare(item)
        share, start = 1.0, item if precision == "fp32" else None
        if precision == "fp32":
            both, swapped = importance_differences(ours, theirs)
            ranked.append(both)
            if swapped is None:
                theirs = replace(theirs, importance=ours.importance)
            elif swapped <= FP32_IMPORTANCE_RELATIVE:
                theirs, start, ties = ours, None, ties + 1
            else:
                mine, other = ours.survivors[0].index, theirs.survivors[0].index
                share = len(np.intersect1d(mine, other)) / max(len(mine), len(other))
        else:  # different survivors would hide what the language graph does: both get the engine's
            mine_held, other_held = held_importance(ours.importance), held_importance(theirs.importance)
            held.append(abs(mine_held - other_held) / abs(other_held) if other_held else abs(mine_held))
            theirs = ours
        shares.append(share)
        ours_logits, theirs_logits = session.prefill(ours).logits, reference.session.prefill(theirs).logits
        differences.append(float(np.abs(ours_logits - theirs_logits).max()))
        tolerances.append(FP32_LOGITS if precision == "fp32" else FP16_LOGITS_RELATIVE * float(np.abs(theirs_logits).max()))
        rounded = 0.0
        if eager is not None and share == 1 and differences[-1] > tolerances[-1]:
            rounded = _rounding(eager, start, theirs, theirs_logits)
        roundings.append(rounded)
    if precision == "fp32":
        note = f"on {ties} of {len(shares)} inputs others were kept that are as important to rounding: logits are of these" if ties else ""
        yield Finding(rung, "survivors that differ, share", 1 - min(shares), 0.0, min(shares) == 1, note)
        worst = float(np.max(ranked))
        yield Finding(rung, "importance of the survivors, relative", worst, FP32_IMPORTANCE_RELATIVE, worst <= FP32_IMPORTANCE_RELATIVE)
    else:
        worst, allowed = float(np.max(held)), FP16_IMPORTANCE_RELATIVE * (1 + len(session.engine.schedule.tower_stages))
        yield Finding(rung, "importance held by the survivors, relative", worst, allowed, worst <= allowed)
    yield _rounding_finding(rung, f"logits, pruned, against {against}", precision, differences, tolerances, roundings)


def importance_differences(ours: Prepared, theirs: Prepared) -> tuple[float, float | None]:
    """How far importance is apart, as shares of the largest in ``theirs``: at tokens that survive in both, and from token to token in order of
    importance at those that do in one alone (None where there are none, infinite where they are not as many or one of them is protected, which says
    nothing of its importance).
    """
    (mine,), (other,) = (prepared.survivors for prepared in (ours, theirs))
    in_both, in_both_too = np.isin(mine.index, other.index), np.isin(other.index, mine.index)
    free = theirs.importance < PROTECTED
    scale = float(np.abs(theirs.importance[free]).max(initial=0.0)) or 1.0
    apart = np.abs(ours.importance[in_both] - theirs.importance[in_both_too])[free[in_both_too]]
    both = float(apart.max(initial=0.0)) / scale
    if in_both.all() and in_both_too.all():
        return both, None
    alone, alone_too = np.sort(ours.importance[~in_both]), np.sort(theirs.importance[~in_both_too])
    comparable = alone.size == alone_too.size and max(alone[-1], alone_too[-1]) < PROTECTED
    return both, float(np.abs(alone - alone_too).max()) / scale if comparable else np.inf


def held_importance(importance: NDArray[np.float32]) -> float:
    """Sum over the survivors [M] but those that are protected, whose importance says only that."""
    return float(importance[importance < PROTECTED].sum())


def _rounding(eager: Session, item: VerifyInput | None, exact: Prepared, exact_logits: NDArray[Any]) -> float:
    """How far PyTorch in the engine's precision is from float64 on an input, as it is or rounded at random.

    From the picture on, where ``item`` is given; runs that keep other tokens do not count then, since that is no rounding of these logits. Else from
    what goes into the decoder on, as ``exact`` has it.
    """
    furthest = 0.0
    for seed in range(ROUNDINGS):
        with RandomRounding(seed) if seed else nullcontext():
            rounded = exact if item is None else eager.prepare(item.prompt, [item.image])
            if np.array_equal(rounded.survivors[0].index, exact.survivors[0].index):
                logits = eager.prefill(replace(rounded, importance=exact.importance)).logits
                furthest = max(furthest, float(np.abs(logits - exact_logits).max()))
    return furthest


def _rounding_finding(
    rung: str, quantity: str, precision: str, differences: Sequence[float], tolerances: Sequence[float], roundings: Sequence[float]
) -> Finding:
    """Each input is allowed its tolerance, or what PyTorch loses on it where that is more; 0 where nobody asked, being within the first."""
    allowed = [max(pair) for pair in zip(tolerances, roundings, strict=True)]
    shares = [difference / most for difference, most in zip(differences, allowed, strict=True)]
    worst = int(np.argmax(shares))  # NaN is the largest
    loose = sum(rounding > tolerance for tolerance, rounding in zip(tolerances, roundings, strict=True))
    note = (
        f"on {loose} of {len(allowed)} inputs PyTorch in {precision}, rounded in {ROUNDINGS} ways, is further off: allowed as much" if loose else ""
    )
    return Finding(rung, quantity, differences[worst], allowed[worst], shares[worst] <= 1, note)


def _decoding(session: Session, inputs: Sequence[VerifyInput], progress: Callable[[str, float], None]) -> Iterator[Finding]:
    """The caches after a prefill must mean the same however the following tokens arrive."""
    precision = session.engine.precision
    in_chunk, in_prefill, largest = [], [], 0.0
    for number, item in enumerate(inputs):
        progress("(c) step by step", number / len(inputs))
        prepared = session.prepare(item.prompt, [item.image])
        step = session.prefill(prepared)
        tokens = []
        for _ in range(DECODE_STEPS):  # stop tokens too: these are numbers, not an answer
            token = int(step.logits.argmax())
            tokens.append(token if token != session.engine.tokens.image else 0)
            step = session.decode(tokens[-1])
        stepwise = step.logits
        largest = max(largest, float(np.abs(stepwise).max()))
        session.prefill(prepared)
        in_chunk.append(float(np.abs(session.extend(tokens).logits - stepwise).max()))
        if session.engine.schedule.guidance_weight == 0:
            extra = np.arange(DECODE_STEPS) + prepared.next_position
            longer = replace(
                prepared,
                input_ids=np.concatenate([prepared.input_ids, tokens]),
                position_ids=np.concatenate([prepared.position_ids, np.tile(extra, (3, 1))], 1),
            )
            in_prefill.append(float(np.abs(session.prefill(longer).logits - stepwise).max()))
    yield _logits_finding("c", precision, "logits, step by step against one chunk", in_chunk, largest)
    if in_prefill:
        yield _logits_finding("c", precision, "logits, step by step against one prefill", in_prefill, largest)
