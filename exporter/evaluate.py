"""Evaluate: how often an engine answers rightly, per kind of question, and what that cost.

Data is JSONL, one ``{"image": "relative/path.png", "prompt": "…", "answer": "…", "kind": "…"}`` a line (``images`` for several, ``kind``
optional), or the generated scenes of the small model. An answer is right if it equals the expected one but for case, space and a final stop.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines.session import ImageSource, Session
from .tiny.scenes import samples

__all__ = [
    "CALIBRATION_SEED",
    "DataError",
    "Evaluation",
    "LabelledSample",
    "Score",
    "evaluate_session",
    "generated_samples",
    "read_samples",
    "wilson_interval",
]

Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
EVALUATION_SEED = 9_000_000  # held out; other seeds serve training, its reports, `verify` and calibration
CALIBRATION_SEED = 6_000_000  # of what `tune` looks at, which evaluation must not
MAX_ANSWER_TOKENS = 64


class DataError(ValueError):
    """A data file that cannot be used; the message names file and line."""


@dataclass(frozen=True)
class LabelledSample:
    """A question about images with its right answer."""

    images: tuple[ImageSource, ...]
    prompt: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Score:
    """Share of right answers with its 95 % interval (Wilson)."""

    accuracy: float
    interval: tuple[float, float]
    n: int


@dataclass(frozen=True)
class Evaluation:
    """An engine's scores; ``visual_tokens`` and ``kept`` are means over the samples, ``kept`` of the last stage."""

    engine: str
    average_keep: float
    total: Score
    by_kind: Mapping[str, Score]
    visual_tokens: float
    kept: float
    kv_visual_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The JSON form of ``evaluate --json``."""
        return {
            "engine": self.engine,
            "average_keep": self.average_keep,
            **vars(self.total),
            "by_kind": {kind: vars(score) for kind, score in self.by_kind.items()},
            "visual_tokens": self.visual_tokens,
            "kept": self.kept,
            "kv_visual_bytes": self.kv_visual_bytes,
        }


def evaluate_session(
    session: Session, data: Sequence[LabelledSample], *, name: str, progress: Callable[[str, float], None] = lambda phase, share: None
) -> Evaluation:
    """Ask every question, greedily."""
    right: dict[str, list[bool]] = defaultdict(list)
    tokens = kept = 0
    kv_visual = 0
    limit = min(MAX_ANSWER_TOKENS, session.engine.limits.max_text_tokens)
    for number, sample in enumerate(data):
        progress(f"evaluate {name}", number / len(data))
        result = session.generate(sample.prompt, sample.images, max_new_tokens=limit)
        right[sample.kind].append(_plain(result.text) == _plain(sample.answer))
        tokens += result.visual_tokens
        kept += result.stages[-1].kept if result.stages else result.visual_tokens
        kv_visual = result.kv_bytes.visual
    everything = [verdict for verdicts in right.values() for verdict in verdicts]
    return Evaluation(
        engine=name,
        average_keep=session.engine.schedule.average_keep(session.engine.shape.decoder.layers),
        total=_score(everything),
        by_kind={kind: _score(verdicts) for kind, verdicts in right.items()},
        visual_tokens=tokens / len(data),
        kept=kept / len(data),
        kv_visual_bytes=kv_visual,
    )


def read_samples(path: Path, *, labelled: bool = True) -> list[LabelledSample]:
    """Read a JSONL file; image paths are relative to it. Where it need not be ``labelled``, a missing answer is empty.

    Raises:
        DataError: no lines, or a line that is not as it should be.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    found = [_sample(path, number, line, labelled) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{path}: no samples")
    return found


def generated_samples(count: int, kinds: Sequence[str], side: int, *, seed: int = EVALUATION_SEED) -> Iterator[LabelledSample]:
    """Held-out scenes of ``side`` × ``side`` pixels, kinds in turn."""
    for sample in samples(seed=seed, count=count, kinds=kinds, width=side, height=side):
        yield LabelledSample((sample.image,), sample.question.prompt, sample.question.answer, sample.question.kind)


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """Wilson score interval of a proportion, 95 % (Wilson, 1927): sensible at 0 and 1 and for small n."""
    share, square = right / n, Z_95**2
    center = (share + square / (2 * n)) / (1 + square / n)
    half = Z_95 / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def _sample(path: Path, number: int, line: str, labelled: bool) -> LabelledSample:
    where = f"{path}, line {number}"
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: must be a JSON object")
    if not labelled:
        values.setdefault("answer", "")
    for key in ("prompt", "answer"):
        if not isinstance(values.get(key), str):
            raise DataError(f"{where}: {key!r} must be a string")
    names = values.get("images", [values["image"]] if "image" in values else [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: 'image' must be a path, 'images' a list of paths")
    return LabelledSample(tuple(path.parent / name for name in names), values["prompt"], values["answer"], str(values.get("kind", "all")))


def _score(verdicts: Sequence[bool]) -> Score:
    return Score(sum(verdicts) / len(verdicts), wilson_interval(sum(verdicts), len(verdicts)), len(verdicts))


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").strip()
