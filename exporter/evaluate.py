"""Evaluate: how often an engine or a pruning method answers rightly, how well it agrees with the unpruned model, and what it costs.

An answer is right if it equals the expected one but for case, space and a final stop. Agreement needs no labels: the share of first tokens
that are the unpruned model's, the overlap of the two distributions of the first token, and the cosine of the last prompt token's hidden state. Every
result carries its cost, so that methods are compared at equal average keep or at equal prefill FLOPs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.errors import EngineError
from ..engines.manifest import Engine
from ..engines.results import Prepared, stage_counts
from ..engines.sampling import SamplingParams, next_token
from ..engines.session import Session
from .budget import kv_bytes, prefill_flops
from .data import DataError, LabelledSample
from .reference import Question, ReferenceModel, Reply, cosine, overlap
from .schedule import Schedule, keep_count
from .shape import ModelShape
from .shared_tower import SharedTower, embed_plainly

if TYPE_CHECKING:
    from .methods import Method

__all__ = ["Agreement", "Candidate", "Evaluation", "Score", "check_reference", "evaluate_candidates", "evaluate_session", "wilson_interval"]

Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
MAX_ANSWER_TOKENS = 64
KV_BYTES_PER_VALUE = 2  # what a cache entry is counted as, of engines and methods alike: fp16

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Score:
    """Share of right answers with its 95 % interval (Wilson)."""

    accuracy: float
    interval: tuple[float, float]
    n: int


@dataclass(frozen=True)
class Agreement:
    """With the unpruned model on the same questions: share of equal first tokens, and means of the probability that both give alike to the first
    token (1 − total variation distance) and of the last hidden state's cosine."""

    first_token: float
    overlap: float
    cosine: float


@dataclass(frozen=True)
class Evaluation:
    """What one engine or method did.

    Attributes:
        name: of the engine or method.
        average_keep: visual tokens kept, mean over decoder layers, as a share of the whole picture's.
        prefill_flops: of the unpruned prefill's, tower and decoder together, choosing included.
        kv_visual_bytes: visual KV cache of the largest request, in fp16 whatever an engine's precision, so that rows can be compared.
        total, by_kind: None and empty where the data has no answers.
        agreement: None where no unpruned reference was at hand.
        visual_tokens, kept: means over the samples, ``kept`` of the last stage.
    """

    name: str
    average_keep: float
    prefill_flops: float
    kv_visual_bytes: int
    total: Score | None
    by_kind: Mapping[str, Score]
    agreement: Agreement | None
    visual_tokens: float
    kept: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON form of ``evaluate --json``."""
        return {
            **vars(self),
            "total": vars(self.total) if self.total else None,
            "by_kind": {kind: vars(score) for kind, score in self.by_kind.items()},
            "agreement": vars(self.agreement) if self.agreement else None,
        }


@dataclass(frozen=True)
class Candidate:
    """A method with a schedule, to be evaluated in PyTorch.

    Attributes:
        name: for the table; method: its graphs; schedule: what they are walked with.
        image_share: share of its visual tokens to which a picture is resized first; 1 leaves it.
    """

    name: str
    method: Method
    schedule: Schedule
    image_share: float = 1.0


class _Tally:
    """Collects one engine's or candidate's answers."""

    def __init__(self) -> None:
        self.right: dict[str, list[bool]] = defaultdict(list)
        self.same_first: list[bool] = []
        self.overlaps: list[float] = []
        self.cosines: list[float] = []
        self.visual_tokens: list[int] = []
        self.kept: list[int] = []
        self.keep_shares: list[float] = []
        self.flops: list[float] = []
        self.kv_bytes: list[int] = []

    def add(self, sample: LabelledSample, text: str, answer: Reply, unpruned: Reply | None) -> None:
        if sample.answer:
            self.right[sample.kind].append(_plain(text) == _plain(sample.answer))
        if unpruned is not None:
            self.same_first.append(answer.token_ids[0] == unpruned.token_ids[0])
            self.overlaps.append(overlap(answer.logits, unpruned.logits))
            self.cosines.append(cosine(answer.last_hidden, unpruned.last_hidden))

    def result(self, name: str) -> Evaluation:
        everything = [verdict for verdicts in self.right.values() for verdict in verdicts]
        means = (float(np.mean(values)) for values in (self.same_first, self.overlaps, self.cosines))
        agreement = Agreement(*means) if self.cosines else None
        return Evaluation(
            name=name,
            average_keep=float(np.mean(self.keep_shares)),
            prefill_flops=float(np.mean(self.flops)),
            kv_visual_bytes=max(self.kv_bytes),
            total=_score(everything) if everything else None,
            by_kind={kind: _score(verdicts) for kind, verdicts in self.right.items()},
            agreement=agreement,
            visual_tokens=float(np.mean(self.visual_tokens)),
            kept=float(np.mean(self.kept)),
        )


def check_reference(engine: Engine, reference: Engine) -> None:
    """Refuse what an engine cannot be compared with.

    Raises:
        EngineError: ``reference`` is pruned itself, or of another model.
    """
    if reference.schedule.stages:
        raise EngineError(f"--reference {reference.path}: drops visual tokens itself; build one without --keep")
    if reference.model_fingerprint != engine.model_fingerprint:
        raise EngineError(f"--reference {reference.path}: not of the model of {engine.path}; build one from the same checkpoint")


def evaluate_session(
    session: Session,
    data: Sequence[LabelledSample],
    *,
    name: str,
    reference: Session | None = None,
    progress: Progress = lambda phase, share: None,
) -> Evaluation:
    """Ask an engine every question, greedily; ``reference`` is an unpruned engine of the same model, to state agreement with.

    Raises:
        EngineError: as :func:`check_reference`, or logits that are not finite.
        DataError: no questions.
    """
    tally, engine = _Tally(), session.engine
    _check_questions(data)
    if reference is not None:
        check_reference(engine, reference.engine)
    for number, sample in enumerate(data):
        progress(f"evaluate {name}", number / len(data))
        prepared = session.prepare(sample.prompt, sample.images)
        answer = _ask(session, prepared, MAX_ANSWER_TOKENS)
        unpruned = _ask(reference, reference.prepare(sample.prompt, sample.images), 1) if reference is not None else None
        tally.add(sample, session.encoder.decode([token for token in answer.token_ids if token not in engine.tokens.stop]), answer, unpruned)
        grids = [(image.rows, image.columns) for image in prepared.survivors]
        stages = stage_counts(engine, prepared.budgets)
        tally.visual_tokens.append(prepared.visual_tokens)
        tally.kept.append(stages[-1].kept if stages else prepared.visual_tokens)
        tally.keep_shares.append(engine.schedule.average_keep(engine.shape.decoder.layers))
        full = prefill_flops(Schedule(), engine.shape, grids, text_tokens=prepared.text_tokens)
        tally.flops.append(prefill_flops(engine.schedule, engine.shape, grids, text_tokens=prepared.text_tokens) / full)
        kv = kv_bytes(engine.schedule, engine.shape, tokens=prepared.visual_tokens, bytes_per_value=KV_BYTES_PER_VALUE)  # as methods are counted
        tally.kv_bytes.append(kv)
    return tally.result(name)


def evaluate_candidates(
    reference: ReferenceModel, candidates: Sequence[Candidate], data: Sequence[LabelledSample], *, progress: Progress = lambda phase, share: None
) -> list[Evaluation]:
    """Ask every question of every candidate, sample by sample, so that the unpruned tower is computed once for all of them.

    Raises:
        DataError: no questions.
    """
    _check_questions(data)
    first_blocks = {candidate.schedule.tower_stages[0].layer for candidate in candidates if candidate.schedule.tower_stages}
    tower = SharedTower(reference, sorted(first_blocks))
    graphs = [reference.graphs(candidate.schedule, candidate.method.vision, candidate.method.language) for candidate in candidates]
    whole_vision, whole_language = reference.graphs(Schedule())
    tallies = [_Tally() for _ in candidates]
    for number, sample in enumerate(data):
        progress("evaluate", number / len(data))
        whole = reference.read(sample.images, sample.prompt)
        walked = [tower.walk(picture, keep_finals=True) for picture in whole.pictures]
        unpruned = reference.reply(whole_language, whole_vision, whole, [tower.embed(whole_vision, w) for w in walked], new_tokens=1)
        full = prefill_flops(Schedule(), reference.shape, _grids(whole), text_tokens=whole.text_tokens)
        for candidate, (vision, language), tally in zip(candidates, graphs, tallies, strict=True):
            if candidate.image_share < 1:
                seen = reference.read(sample.images, sample.prompt, image_share=candidate.image_share)
                embedded = [embed_plainly(vision, picture) for picture in seen.pictures]
            else:
                seen, embedded = whole, [tower.embed(vision, w) for w in walked]
            answer = reference.reply(language, vision, seen, embedded, new_tokens=MAX_ANSWER_TOKENS)
            text = reference.encoder.decode([token for token in answer.token_ids if token not in reference.tokens.stop])
            tally.add(sample, text, answer, unpruned)
            _count(tally, candidate, reference.shape, whole, seen, full)
    return [tally.result(candidate.name) for candidate, tally in zip(candidates, tallies, strict=True)]


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """Wilson score interval of a proportion, 95 % (Wilson, 1927): sensible at 0 and 1 and for small n."""
    share, square = right / n, Z_95**2
    center = (share + square / (2 * n)) / (1 + square / n)
    half = Z_95 / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def _check_questions(data: Sequence[LabelledSample]) -> None:
    if not data:
        raise DataError("there are no questions to ask; give at least one")


def _count(tally: _Tally, candidate: Candidate, shape: ModelShape, whole: Question, seen: Question, full: int) -> None:
    """Add what one question cost a candidate; ``full``: FLOPs of the unpruned prefill."""
    schedule, tokens, layers = candidate.schedule, seen.visual_tokens, shape.decoder.layers
    tally.visual_tokens.append(whole.visual_tokens)
    tally.kept.append(keep_count(tokens, schedule.keep_at("decoder", layers - 1)))
    tally.keep_shares.append(schedule.average_keep(layers) * (tokens / whole.visual_tokens if tokens else 1.0))
    spent = prefill_flops(schedule, shape, _grids(seen), text_tokens=seen.text_tokens, scoring=candidate.method.scores_attention)
    tally.flops.append(spent / full)
    tally.kv_bytes.append(kv_bytes(schedule, shape, tokens=tokens, bytes_per_value=KV_BYTES_PER_VALUE))


def _grids(question: Question) -> list[tuple[int, int]]:
    return [(picture.rows, picture.columns) for picture in question.pictures]


def _ask(session: Session, prepared: Prepared, limit: int) -> Reply:
    """Greedy answer of an engine, as long as there is room."""
    greedy, generator = SamplingParams(), np.random.default_rng(0)
    step = session.prefill(prepared)
    hidden = step.last_hidden.astype(np.float32)
    token_ids = [next_token(step.logits, greedy, generator)]
    while token_ids[-1] not in session.engine.tokens.stop and len(token_ids) < limit and session.room:
        token_ids.append(next_token(session.decode(token_ids[-1]).logits, greedy, generator))
    return Reply(hidden, step.logits, tuple(token_ids))


def _score(verdicts: Sequence[bool]) -> Score:
    return Score(sum(verdicts) / len(verdicts), wilson_interval(sum(verdicts), len(verdicts)), len(verdicts))


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").strip()
