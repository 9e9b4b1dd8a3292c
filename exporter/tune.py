"""Flow-guided optimisation: schedules found by keeping the last token's representation where it was (VFlowOpt, section 3.4).

h is the last prompt token after the final norm, without pruning, h(θ) with schedule θ. The paper maximises the mean of cos(h, h(θ)) over calibration
samples. All directions of h count alike there, though the model reads it through its output layer only; so by default h is read as the model does:
p = softmax(W h) is the distribution of the first token of the answer, and the mean overlap Σ min(p, p(θ)) is maximised (docs/quality.md compares
the two). What does not change between trials is computed once: h, the tower up to the first place where a stage may stand, and the
statistics from which any global threshold's importance follows. A trial runs from its first stage on.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from .checkpoint import Checkpoint
from .data import CalibrationSample
from .reference import ReferenceModel, Reply, cosine, overlap
from .schedule import Schedule, ScheduleError
from .search_space import SearchSpace
from .shared_tower import SharedTower, embed_plainly
from .study import finished_trials, open_study

__all__ = ["MEASURES", "CalibrationSample", "FlowObjective", "FrontPoint", "Measure", "Resource", "TuneResult", "tune_front", "tune_schedule"]

LEADERS = 8  # of a search, for other samples to judge: enough that luck on its own samples does not decide
STARTUP_TRIALS = 10  # random, before the Gaussian process has something to go by
Resource = Literal["kv", "flops"]
Measure = Literal["overlap", "cosine"]
MEASURES: dict[Measure, str] = {
    "overlap": "mean overlap of the first token's distribution with the unpruned model's",
    "cosine": "mean cosine of the last prompt token's hidden state with the unpruned model's",
}
Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class TuneResult:
    """The best schedule and its point in the search space, its objective, and how many trials the study holds.

    ``leaders`` are the points of the best trials, best first, no two of one value: to be judged on other samples, since the best here may be luck.
    """

    schedule: Schedule
    point: Mapping[str, float | str]
    value: float
    trials: int
    leaders: tuple[Mapping[str, float | str], ...]


@dataclass(frozen=True)
class FrontPoint:
    """A schedule that none beats in both: its objective and what it costs (a share of the unpruned)."""

    schedule: Schedule
    value: float
    cost: float


class FlowObjective:
    """How much of the unpruned model's last prompt token is left under a schedule: mean over calibration samples, 1 is all.

    Args:
        measure: ``overlap`` of the first token's distributions, or ``cosine`` of the hidden states, as in the paper; where nearly every answer begins
            alike (descriptions), only the cosine tells schedules apart.
        blocks: tower blocks before which the first tower stage may stand; the unpruned tower is kept at these.

    Raises:
        ScheduleError: no samples, or one without an image.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: Sequence[CalibrationSample],
        *,
        measure: Measure = "overlap",
        blocks: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not samples:
            raise ScheduleError("calibration needs at least one sample")
        for number, sample in enumerate(samples, 1):
            if not sample.images:
                raise ScheduleError(f"calibration sample {number} ({sample.prompt:.40}) has no image; pruning has nothing to change there")
        self.measure = measure
        self._reference = ReferenceModel(checkpoint, dtype)
        self.shape = self._reference.shape
        self._tower = SharedTower(self._reference, blocks)
        self._questions = [self._reference.read(sample.images, sample.prompt) for sample in samples]
        self._walked = [[self._tower.walk(picture) for picture in question.pictures] for question in self._questions]
        self._unpruned = self._replies(Schedule())

    @property
    def samples(self) -> int:
        """How many samples it calibrates on."""
        return len(self._questions)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the preprocessed samples, for a schedule's provenance."""
        digest = hashlib.sha256()
        for question in self._questions:
            digest.update(np.array(question.token_ids, np.int64).tobytes())
            for picture in question.pictures:
                digest.update(picture.pixel_values.numpy().tobytes())
        return digest.hexdigest()

    def score(self, schedule: Schedule) -> float:
        """The objective, from the first stage on."""
        schedule.check(self.shape)
        return self._mean(self._replies(schedule), self._unpruned)

    def score_plainly(self, schedule: Schedule) -> float:
        """The same with nothing kept between trials; what ``score`` is measured against."""
        return self._mean(self._replies(schedule, plainly=True), self._replies(Schedule(), plainly=True))

    def _mean(self, pruned: Sequence[Reply], unpruned: Sequence[Reply]) -> float:
        pairs = list(zip(pruned, unpruned, strict=True))
        if self.measure == "cosine":
            return float(np.mean([cosine(a.last_hidden, b.last_hidden) for a, b in pairs]))
        return float(np.mean([overlap(a.logits, b.logits) for a, b in pairs]))

    def _replies(self, schedule: Schedule, *, plainly: bool = False) -> list[Reply]:
        """The last prompt token of each sample."""
        vision, language = self._reference.graphs(schedule)
        replies = []
        for question, walked in zip(self._questions, self._walked, strict=True):
            embedded = [embed_plainly(vision, w.picture) if plainly else self._tower.embed(vision, w) for w in walked]
            replies.append(self._reference.reply(language, vision, question, embedded, new_tokens=0))
        return replies


def tune_schedule(
    objective: FlowObjective,
    space: SearchSpace,
    *,
    fingerprint: str,
    trials: int,
    seed: int = 0,
    startup: int = STARTUP_TRIALS,
    storage: str | None = None,
    study_name: str = "vflow",
    start: Sequence[Mapping[str, float | str]] | None = None,
    progress: Progress = lambda done, best: None,
) -> TuneResult:
    """Search with a Gaussian process (Optuna), resuming the study if the storage holds it.

    Args:
        trials: how many to add; with several processes on one storage, each adds its own.
        startup: of these, how many are random before the Gaussian process takes over.
        storage: a file (journal) or a database URL; several processes may share it. None keeps the study in memory.
        start: points to try first; None takes the space's.
        progress: called after each trial with how many are done and the best value so far.

    Raises:
        ScheduleError: Optuna is missing, the study belongs to another model, search or calibration set, or the budget cannot be met.
    """
    study = _study(objective, space, fingerprint, ["maximize"], seed, startup, storage, study_name, space.starts() if start is None else start)

    def evaluate(trial: Any) -> float:
        return objective.score(space.schedule(_suggest(trial, space)))

    _optimize(study, evaluate, trials, lambda done: progress(done, study.best_value))
    best, count = study.best_trial, finished_trials(study)  # once: other processes may add trials meanwhile
    provenance = _provenance(objective, space, seed, count) | {"value": best.value}
    found = replace(space.schedule(best.params), model=fingerprint, provenance=provenance)
    best_first = sorted((trial for trial in study.trials if trial.values), key=lambda trial: -trial.value)
    leaders = tuple({trial.value: trial.params for trial in best_first}.values())[:LEADERS]
    return TuneResult(found, best.params, best.value, count, leaders)


def tune_front(
    objective: FlowObjective,
    space: SearchSpace,
    resource: Resource,
    *,
    fingerprint: str,
    trials: int,
    seed: int = 0,
    startup: int = STARTUP_TRIALS,
    storage: str | None = None,
    study_name: str = "vflow-front",
    progress: Progress = lambda done, best: None,
) -> list[FrontPoint]:
    """The front of quality against a resource, cheapest first; arguments and errors as :func:`tune_schedule`.

    Args:
        resource: ``kv`` (average keep) or ``flops`` (share of the unpruned prefill's). What the space's budget gives is kept to besides.
    """
    if resource == "kv" and space.budget.bounds_keep:
        raise ScheduleError("a front over the KV cache leaves the keep open: leave out --keep and --kv-budget")
    study = _study(objective, space, fingerprint, ["maximize", "minimize"], seed, startup, storage, study_name, _spread(space))

    def evaluate(trial: Any) -> tuple[float, float]:
        schedule = space.schedule(_suggest(trial, space))
        cost = schedule.average_keep(space.shape.decoder.layers) if resource == "kv" else space.flops_share(schedule)
        return objective.score(schedule), cost

    _optimize(study, evaluate, trials, lambda done: progress(done, max(best.values[0] for best in study.best_trials)))
    provenance = _provenance(objective, space, seed, finished_trials(study)) | {"front": resource}
    points = {}
    for best in study.best_trials:
        value, cost = best.values
        schedule = replace(space.schedule(best.params), model=fingerprint, provenance=provenance | {"value": value})
        points[value, cost] = FrontPoint(schedule, value, cost)
    return sorted(points.values(), key=lambda point: point.cost)


def _optimize(study: Any, evaluate: Callable[[Any], Any], trials: int, report: Callable[[int], None]) -> None:
    """Add trials; ``report`` is told after each how many this process has done."""
    done = itertools.count(1)
    study.optimize(evaluate, n_trials=trials, callbacks=[lambda current, trial: report(next(done))])


def _spread(space: SearchSpace) -> list[Mapping[str, float | str]]:
    """The points to start from, at several costs each."""
    if space.budget.bounds_keep:
        return list(space.starts())
    return [point | {"average_keep": share} for share in (0.05, 0.1, 0.25, 0.5) for point in space.starts()[:2]]


def _suggest(trial: Any, space: SearchSpace) -> dict[str, float | str]:
    point: dict[str, float | str] = {name: trial.suggest_float(name, 0.0, 1.0) for name in space.coordinates()}
    return point | {name: trial.suggest_categorical(name, values) for name, values in space.categories().items()}


def _provenance(objective: FlowObjective, space: SearchSpace, seed: int, trials: int) -> dict[str, Any]:
    """How a schedule was found, for ``schedule.json``."""
    budget = space.budget
    return {
        "method": "flow-guided search, Gaussian process",
        "objective": MEASURES[objective.measure],
        "trials": trials,
        "seed": seed,
        "calibration": {"samples": objective.samples, "sha256": objective.fingerprint},
        "budget": {name: value for name, value in vars(budget).items() if value is not None},
    }


def _study(
    objective: FlowObjective,
    space: SearchSpace,
    fingerprint: str,
    directions: list[str],
    seed: int,
    startup: int,
    storage: str | None,
    study_name: str,
    start: Sequence[Mapping[str, float | str]],
) -> Any:
    """The study in the storage, made if it is not there, refused if it is of something else."""
    optuna = _import_optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of `deterministic_objective`
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup, deterministic_objective=True)
    searched = repr(replace(space, shape=None)) + repr(directions)  # type: ignore[arg-type]  # only printed; the model has its fingerprint
    identity = {
        "model": fingerprint,
        "space": hashlib.sha256(searched.encode()).hexdigest()[:16],
        "objective": objective.measure,
        "calibration set": objective.fingerprint,  # values of other samples cannot be compared
    }
    return open_study(storage, study_name, directions=directions, sampler=sampler, identity=identity, start=start)


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ScheduleError("tuning needs Optuna: pip install 'vflow-export[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
