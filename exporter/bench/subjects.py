"""What can be timed: engines of ours, and the same checkpoint in Hugging Face transformers, onnxruntime-genai and OpenVINO GenAI.

A ``SubjectSpec`` is what a child process is told; loading and measuring are in a file for each kind, imported only there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from typing import Any

from ...engines.errors import EngineError
from ...engines.manifest import Engine
from ..schedule import Schedule, unpruned_schedule
from .measurement import Subject

__all__ = ["BASELINES", "SubjectSpec", "baseline_specs", "check_engines", "engine_spec", "load_subject", "schedule_of"]

# Baseline → packages that it imports, and what to install.
BASELINES = {
    "transformers": (("torch", "transformers"), "pip install 'vflow-export[build]'"),
    "onnxruntime-genai": (("onnxruntime_genai", "torch", "transformers"), "pip install 'vflow-export[bench]'"),
    "openvino": (("openvino_genai",), "pip install 'vflow-export[bench]'"),
}


@dataclass(frozen=True)
class SubjectSpec:
    """One thing to time.

    Attributes:
        kind: ``engine`` or a baseline.
        engine: directory of the engine; of baselines the first engine's, for image processor, tokenizer and prompt.
        model: checkpoint, or with OpenVINO the exported folder.
        precision: of weights and arithmetic, as in the manifest.
        pruning_ratio: per cent that OpenVINO GenAI drops before the language model.
        workspace: folder for what has to be made before loading; weights_bytes: what memory must have room for.
    """

    kind: str
    name: str
    engine: str
    model: str
    precision: str
    provider: str
    threads: int
    weights_bytes: int
    pruning_ratio: int = 0
    workspace: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For the child's first line."""
        return asdict(self)


def engine_spec(engine: Engine, *, provider: str, threads: int) -> SubjectSpec:
    """An engine directory."""
    weights = max(entry.size for entry in engine.files.values())
    return SubjectSpec("engine", str(engine.path), str(engine.path), engine.model_name, engine.precision, provider, threads, weights)


def check_engines(engines: Sequence[Engine], sides: Sequence[int], new_tokens: int) -> None:
    """Refuse what would stop a run half way.

    Raises:
        EngineError: engines of different models, an image that one does not take, or an answer that it has no room for.
    """
    first = engines[0]
    for engine in engines:
        if engine.model_fingerprint != first.model_fingerprint:
            raise EngineError(f"{engine.path} is an engine of {engine.model_name}, {first.path} of {first.model_name}; compare engines of one model")
        factor, limit = engine.image_processor.factor, engine.limits.max_visual_tokens
        for side in sides:
            if side % factor:
                raise EngineError(f"--side {side}: must be a multiple of {factor}, the pixels of a visual token")
            if (side // factor) ** 2 > limit:
                raise EngineError(
                    f"--side {side}: is {(side // factor) ** 2} visual tokens, {engine.path} takes {limit}; see --max-visual-tokens of build"
                )
        if new_tokens >= engine.limits.max_text_tokens:
            built = engine.limits.max_text_tokens
            raise EngineError(f"--new-tokens {new_tokens}: {engine.path} has room for {built} text tokens, prompt included; ask for fewer")


def baseline_specs(
    baseline: str, engine: SubjectSpec, *, fingerprint: str, openvino_model: Path | None, pruning_ratios: Sequence[int], workspace: Path
) -> list[SubjectSpec]:
    """A baseline on the checkpoint of ``engine``, which has this fingerprint, in its precision.

    Raises:
        CheckpointError: no checkpoint there. EngineError: a package or an option is missing, or it is another checkpoint.
    """
    packages, install = BASELINES[baseline]
    missing = [name for name in packages if util.find_spec(name) is None]
    if missing:
        raise EngineError(f"--against {baseline} needs {' and '.join(missing)}; {install}")
    if baseline != "openvino":
        from ..checkpoint import open_checkpoint

        if open_checkpoint(engine.model).fingerprint != fingerprint:
            raise EngineError(f"{engine.model} is not the checkpoint that {engine.engine} was built from; name that with --model")
    common = {**engine.to_dict(), "kind": baseline, "name": baseline}
    if baseline == "onnxruntime-genai":
        return [SubjectSpec(**{**common, "name": "onnxruntime-genai, decoder alone", "workspace": str(workspace)})]
    if baseline == "transformers":
        return [SubjectSpec(**common)]
    if engine.provider != "cpu":
        raise EngineError("--against openvino runs on the CPU; use --provider cpu")
    if openvino_model is None or not (openvino_model / "openvino_language_model.xml").is_file():
        raise EngineError(
            "--against openvino needs --openvino-model, a folder from `optimum-cli export openvino --task image-text-to-text "
            "--weight-format fp32` (optimum-intel wants an older transformers than build: an environment of its own)"
        )
    return [
        SubjectSpec(**{**common, "name": "openvino-genai" + (f", {ratio} % pruned" if ratio else ""), "model": str(openvino_model),
                       "pruning_ratio": ratio})
        for ratio in dict.fromkeys(pruning_ratios)
    ]  # fmt: skip


def load_subject(spec: SubjectSpec) -> Subject:
    """Load what a spec names, in this process."""
    if spec.kind == "engine":
        from .engine import EngineSubject

        return EngineSubject(spec)
    if spec.kind == "transformers":
        from .hugging_face import HuggingFaceSubject

        return HuggingFaceSubject(spec)
    if spec.kind == "onnxruntime-genai":
        from .genai import GenaiSubject

        return GenaiSubject(spec)
    from .openvino import OpenVinoSubject

    return OpenVinoSubject(spec)


def schedule_of(spec: SubjectSpec, engine: Engine) -> Schedule | None:
    """The schedule whose arithmetic a subject does; None where it is none of ours."""
    if spec.kind == "engine":
        return engine.schedule
    return None if spec.pruning_ratio else unpruned_schedule()
