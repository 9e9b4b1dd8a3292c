"""Flow-guided optimisation: schedules found by keeping the last token's representation where it was (VFlowOpt, section 3.4).

h is the last prompt token after the final norm, without pruning, h(θ) with schedule θ; the mean of cos(h, h(θ)) over calibration samples is
maximised. What does not change between trials is computed once: h, the tower up to the first place where a stage may stand, and the
statistics from which any global threshold's importance follows. A trial runs from its first stage on.
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engines.directory import kv_segments
from ..engines.manifest import TokenIds
from ..engines.positions import ImageSurvivors, prompt_positions
from ..engines.preprocess import ImageProcessorConfig, load_image, preprocess_image
from ..engines.prompt import PromptEncoder, expand_image_tokens
from ..engines.session import ImageSource
from ..plugins.importance import add_entropy, context_relevance, global_tokens, masked_column_mean, received_attention
from .build import copy_text_files, image_processor
from .checkpoint import Checkpoint
from .model import load_model, pruned_graphs
from .models.qwen2_vl import TowerState, VisionGraph, model_shape
from .reference import TorchBackend
from .schedule import KEEP_UNIT, Importance, Schedule, ScheduleError
from .search_space import SearchSpace

__all__ = ["CalibrationSample", "FlowObjective", "TuneResult", "tune_schedule"]


@dataclass(frozen=True)
class CalibrationSample:
    """An image and a prompt; no label."""

    image: ImageSource
    prompt: str


@dataclass(frozen=True)
class TuneResult:
    """The best schedule, its objective (mean cosine), and how many trials the study holds."""

    schedule: Schedule
    value: float
    trials: int


@dataclass(frozen=True)
class _Prompt:
    """One sample up to the tower: token ids with the image's placeholder, and its patches."""

    token_ids: list[int]
    pixel_values: Tensor  # T [rows, columns, G, patch_dim]
    entropy: Tensor  # float32 [rows, columns, G]


@dataclass(frozen=True)
class _Scoring:
    """Attention statistics of one block over all patches: what any importance parameters need."""

    query: Tensor  # T [heads, P, head_dim]
    key: Tensor
    row_lse: Tensor  # float32 [heads, P]
    received: Tensor  # float32 [P]


class FlowObjective:
    """mean cos(h, h(θ)) over calibration samples, for any schedule of a model.

    Args:
        blocks: tower blocks before which the first tower stage may stand; the unpruned tower is kept at these.
    """

    def __init__(
        self, checkpoint: Checkpoint, samples: Sequence[CalibrationSample], *, blocks: Sequence[int] = (), dtype: torch.dtype = torch.float32
    ) -> None:
        if not samples:
            raise ScheduleError("calibration needs at least one sample")
        self.shape = model_shape(checkpoint.config)
        self._model = load_model(checkpoint, dtype)
        self._dtype = dtype
        with tempfile.TemporaryDirectory() as folder:
            ids = copy_text_files(checkpoint, Path(folder))
            self._tokens = TokenIds(ids["image"], ids["vision_start"], ids["vision_end"], tuple(ids["stop"]))
            encoder = PromptEncoder(Path(folder) / "tokenizer.json", Path(folder) / "chat_template.jinja", self._tokens)
        processor = image_processor(checkpoint)
        self._prompts = [self._read(sample, encoder, processor) for sample in samples]
        self._entry_blocks = sorted({*blocks, self.shape.tower.blocks})
        self._states: list[dict[int, TowerState]] = []
        self._scorings: list[dict[int, _Scoring]] = []
        for prompt in self._prompts:
            states, scorings = self._walk_tower(prompt)
            self._states.append(states)
            self._scorings.append(scorings)
        self._unpruned = [self._last_hidden(prompt, Schedule(), self._embed(n, Schedule())) for n, prompt in enumerate(self._prompts)]

    def score(self, schedule: Schedule) -> float:
        """The objective, from the first stage on."""
        schedule.check(self.shape)
        hidden = (self._last_hidden(prompt, schedule, self._embed(n, schedule)) for n, prompt in enumerate(self._prompts))
        return float(np.mean([_cosine(h, full) for h, full in zip(hidden, self._unpruned, strict=True)]))

    def score_plainly(self, schedule: Schedule) -> float:
        """The same with nothing kept between trials; what ``score`` is measured against."""
        values = []
        for prompt in self._prompts:
            full = self._last_hidden(prompt, Schedule(), self._embed_plainly(prompt, Schedule()))
            values.append(_cosine(self._last_hidden(prompt, schedule, self._embed_plainly(prompt, schedule)), full))
        return float(np.mean(values))

    def _read(self, sample: CalibrationSample, encoder: PromptEncoder, processor: ImageProcessorConfig) -> _Prompt:
        patches = preprocess_image(load_image(sample.image), processor)
        tower = self.shape.tower
        grid = (patches.grid_thw[1] // tower.merge_size, patches.grid_thw[2] // tower.merge_size, tower.group)
        pixel_values = torch.from_numpy(patches.pixel_values).to(self._dtype).reshape(*grid, tower.patch_dim)
        return _Prompt(encoder.encode(sample.prompt, 1), pixel_values, torch.from_numpy(patches.entropy).reshape(grid))

    @torch.inference_mode()
    def _walk_tower(self, prompt: _Prompt) -> tuple[dict[int, TowerState], dict[int, _Scoring]]:
        """The unpruned tower before each entry block, and the scoring statistics of the block before it."""
        graph = self._vision(Schedule())
        rows, columns = prompt.pixel_values.shape[:2]
        state = graph.begin(prompt.pixel_values, prompt.entropy, rows * columns)
        states, scorings, position = {}, {}, 0
        for block in self._entry_blocks:
            if block > 0:
                state = graph.run_blocks(state, position, block - 1)
                scorings[block] = self._scoring(*graph.attend(block - 1, state))
                state = graph.run_blocks(state, block - 1, block)
            states[block], position = state, block
        return states, scorings

    def _scoring(self, query: Tensor, key: Tensor) -> _Scoring:
        """Statistics for exact scoring; a sample of rows is scored anew, which costs as little as it does in the graph."""
        return _Scoring(query, key, *received_attention(query, key, scale=self.shape.tower.head_dim**-0.5))

    @torch.inference_mode()
    def _embed(self, number: int, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
        """visual_embeds, importance and index of a sample, from the first tower stage on."""
        graph, prompt = self._vision(schedule), self._prompts[number]
        first = schedule.tower_stages[0].layer if schedule.tower_stages else self.shape.tower.blocks
        settings = schedule.importance
        last_block = settings.vision_layer % self.shape.tower.blocks == self.shape.tower.blocks - 1
        if first == 0 or first not in self._states[number] or not last_block:
            return self._embed_plainly(prompt, schedule)
        state = self._states[number][first]
        if schedule.tower_stages or schedule.needs_importance:
            state = replace(state, importance=self._importance(number, first, settings))
        return graph.finish(graph.run_blocks(state, first, self.shape.tower.blocks))

    @torch.inference_mode()
    def _embed_plainly(self, prompt: _Prompt, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = prompt.pixel_values.shape[:2]
        budget = torch.zeros(rows * columns, dtype=torch.int32)
        embeds: tuple[Tensor, Tensor, Tensor] = self._vision(schedule)(prompt.pixel_values, prompt.entropy, budget)
        return embeds

    def _importance(self, number: int, block: int, settings: Importance) -> Tensor:
        """Importance before ``block`` for any parameters: float32 [N]; of the map, only the global tokens' rows are computed."""
        scoring, prompt = self._scorings[number][block], self._prompts[number]
        if settings.score_rows < KEEP_UNIT:
            relevance = context_relevance(
                scoring.query,
                scoring.key,
                scale=self.shape.tower.head_dim**-0.5,
                global_threshold=settings.global_threshold,
                score_rows=settings.score_rows,
                global_rows=settings.global_rows,
            )
        elif settings.global_threshold == 0:
            relevance = scoring.received / scoring.received.shape[0]
        else:
            rows = global_tokens(scoring.received, settings.global_threshold).nonzero()[:, 0]
            everyone = torch.ones(rows.shape[0], dtype=torch.bool)
            lse = scoring.row_lse[:, rows]
            relevance = masked_column_mean(scoring.query[:, rows], scoring.key, lse, everyone, scale=self.shape.tower.head_dim**-0.5)
        mapped = add_entropy(relevance, prompt.entropy.reshape(-1), entropy_weight=settings.entropy_weight)
        return mapped.reshape(-1, self.shape.tower.group).mean(1)

    def _vision(self, schedule: Schedule) -> VisionGraph:
        return pruned_graphs(self._model, self.shape, schedule)[0]

    def _last_hidden(self, prompt: _Prompt, schedule: Schedule, embedded: tuple[Tensor, Tensor, Tensor]) -> NDArray[np.float32]:
        """h(θ): float32 [H]."""
        visual_embeds, importance, index = embedded
        rows, columns = prompt.pixel_values.shape[:2]
        survivors = [ImageSurvivors(rows, columns, index.numpy())]
        input_ids, visual_positions = expand_image_tokens(prompt.token_ids, [index.shape[0]], image_token=self._tokens.image)
        positions, _ = prompt_positions(input_ids, survivors, image_token=self._tokens.image, renumber_first_stage=schedule.renumber_first_stage)
        layers, text = self.shape.decoder.layers, input_ids.size - index.shape[0]
        segments = kv_segments(schedule, layers, max_visual_tokens=rows * columns, max_text_tokens=text)
        backend = TorchBackend(self._model, self.shape, schedule, segments)
        _, last_hidden = backend.language(
            input_ids=input_ids[None],
            position_ids=positions[:, None],
            visual_embeds=visual_embeds.numpy(),
            visual_positions=visual_positions,
            importance=importance.numpy(),
            budget=rows * columns,
            past_lengths=np.zeros((1, len(segments)), np.int64),
        )
        return last_hidden.astype(np.float32)


def tune_schedule(
    objective: FlowObjective,
    space: SearchSpace,
    *,
    fingerprint: str,
    trials: int,
    seed: int = 0,
    storage: str | None = None,
    study_name: str = "vflow",
    start: Sequence[Mapping[str, float | str]] = (),
    progress: Callable[[int, float], None] = lambda trial, best: None,
) -> TuneResult:
    """Search with a Gaussian process (Optuna), resuming the study if the storage holds it.

    Args:
        storage: a file (journal) or a database URL; several processes may share it. None keeps the study in memory.
        start: points to try first.
        progress: called after each trial with its number and the best value so far.

    Raises:
        ScheduleError: Optuna is missing, the study belongs to another model or search, or the budget cannot be met.
    """
    optuna = _import_optuna()
    names = space.coordinates()
    study = optuna.create_study(
        storage=_storage(optuna, storage),
        study_name=study_name,
        direction="maximize",
        sampler=_sampler(optuna, seed),
        load_if_exists=True,
    )
    searched = repr(replace(space, shape=None))  # type: ignore[arg-type]  # only printed; the model has its fingerprint
    identity = {"model": fingerprint, "space": hashlib.sha256(searched.encode()).hexdigest()[:16]}
    known = study.user_attrs
    for name, value in identity.items():
        if known.get(name, value) != value:
            raise ScheduleError(f"study {study_name!r} in {storage} was made for another {name}; choose another --study or --study-name")
        study.set_user_attr(name, value)
    if not study.trials:
        for point in start:
            study.enqueue_trial(dict(point))

    def evaluate(trial: Any) -> float:
        point: dict[str, float | str] = {name: trial.suggest_float(name, 0.0, 1.0) for name in names}
        point |= {name: trial.suggest_categorical(name, values) for name, values in space.categories().items()}
        return objective.score(space.schedule(point))

    def report(current: Any, trial: Any) -> None:
        progress(trial.number + 1, current.best_value)

    study.optimize(evaluate, n_trials=trials, callbacks=[report])
    found = space.schedule(study.best_params)
    provenance = {"method": "flow-guided, Gaussian process", "objective": study.best_value, "trials": len(study.trials), "seed": seed}
    return TuneResult(replace(found, model=fingerprint, provenance=provenance), study.best_value, len(study.trials))


def _sampler(optuna: Any, seed: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of `deterministic_objective`
        return optuna.samplers.GPSampler(seed=seed, deterministic_objective=True)


def _storage(optuna: Any, storage: str | None) -> Any:
    if storage is None or "://" in storage:
        return storage
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ScheduleError("tuning needs Optuna: pip install 'vflow-export[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
