"""Build: checkpoint → traced graphs → weights → engine directory."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from ..engines.backends.cuda import gpu_capability
from ..engines.directory import kv_segments, open_engine, write_engine_directory
from ..engines.errors import EngineError
from ..engines.graphs import TARGETS, parse_graph, parse_targets
from ..engines.manifest import MANIFEST_FORMAT, Engine, Limits
from ..engines.preprocess import ImageProcessorConfig
from ..engines.tensorrt_llm import check_schedule
from ..engines.triton_server.settings import Settings
from ..plugins.compile import check_target, compile_plugins, graph_kernels
from .checkpoint import Checkpoint, CheckpointError
from .model import check_weights, pruned_graphs, shapes_only
from .models import family_of, image_token_ids, model_shape
from .onnx_writer import write_graphs
from .onnxruntime_graph import graph_for_onnxruntime
from .presets import DEFAULT_MAX_TEXT_TOKENS, DEFAULT_MAX_VISUAL_TOKENS
from .schedule import Schedule
from .tensorrt.targets import build_target, check_targets
from .tensorrt_llm import TENSORRT_LLM, write_script
from .trace import trace_language, trace_vision
from .triton_repository import ENGINE_FROM_MODEL, REPOSITORY_FOLDER, VISION_TARGET, repository_name, write_model, write_vision_model

__all__ = [
    "PRECISIONS",
    "BuildOptions",
    "build_engine",
    "copy_text_files",
    "image_processor",
]

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VISION_FILE, LANGUAGE_FILE, SCHEDULE_FILE = "vision.onnx", "language.onnx", "schedule.json"
CPU_FILES = {VISION_FILE: "vision.cpu.onnx", LANGUAGE_FILE: "language.cpu.onnx"}
PLUGINS_FOLDER = "plugins"
FP8_CAPABILITY = 8.9  # the builder refuses 8.0 by name, and without any capability builds for 8.0 and says nothing

Progress = Callable[[str, float], None]  # phase, share done in 0..1


@dataclass(frozen=True)
class BuildOptions:
    """What a build needs beside model and schedule; limits as in the manifest."""

    precision: str = "fp32"
    max_visual_tokens: int = DEFAULT_MAX_VISUAL_TOKENS
    max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS
    force: bool = False
    # GPUs such as "8.9". With the target tensorrt-rtx its engines are for these; else the ops' kernels are compiled for them into plugins/.
    compute_capabilities: tuple[str, ...] = ()
    # Of engines.graphs.TARGETS, and tensorrt-llm, for which nothing is built. ONNX Runtime can run every engine directory, bf16 apart.
    targets: tuple[str, ...] = ()
    weights: str = "full"  # of engines.manifest.WEIGHTS


def build_engine(
    checkpoint: Checkpoint, schedule: Schedule, output: Path, options: BuildOptions, *, progress: Progress = lambda phase, share: None
) -> Engine:
    """Build an engine directory.

    Raises:
        CheckpointError, CompileError, EngineError, ScheduleError: what is wrong with model, kernels, target or schedule; nothing is left behind.
    """
    started = time.monotonic()
    check_targets(options.targets, options.compute_capabilities)
    _check_types(options)
    dtype = PRECISIONS[options.precision]
    shape = model_shape(checkpoint.config)
    schedule.check(shape, fingerprint=checkpoint.fingerprint)
    if TENSORRT_LLM in options.targets:
        check_schedule(schedule, shape.decoder.layers)
    _check_limits(checkpoint, options)
    processor = image_processor(checkpoint, options.max_visual_tokens)
    manifest: dict[str, Any] = {}
    with write_engine_directory(output, manifest, force=options.force) as folder:
        tokens = copy_text_files(checkpoint, folder)
        write_model(folder / REPOSITORY_FOLDER, repository_name(checkpoint.name), Settings(ENGINE_FROM_MODEL))
        progress("trace vision", 0.0)
        with shapes_only(checkpoint, dtype) as model:
            check_weights(checkpoint, model)
            vision_graph, language_graph = pruned_graphs(model, shape, schedule)
            vision = trace_vision(vision_graph, shape, dtype=dtype)
            progress("trace language", 0.0)
            language = trace_language(language_graph, shape, schedule, dtype=dtype)
        graphs = [(vision, VISION_FILE), (language, LANGUAGE_FILE)]
        write_graphs(
            graphs, checkpoint, folder, weights=options.weights,
            progress=lambda done, total: progress("write weights", done / max(total, 1)),
        )  # fmt: skip
        cpu_files = {} if options.precision == "bf16" else CPU_FILES  # for bf16 ONNX Runtime has no kernels
        for file, cpu_file in cpu_files.items():
            ir.save(graph_for_onnxruntime(folder / file), folder / cpu_file)
        schedule.save(folder / SCHEDULE_FILE)
        capabilities = _kernel_capabilities(options)
        if capabilities:
            traced = [onnx.load(folder / file, load_external_data=False) for _, file in graphs]
            compile_plugins(
                folder / PLUGINS_FOLDER, graph_kernels(traced, options.precision), capabilities,
                progress=lambda done, total: progress("compile kernels", done / total),
            )  # fmt: skip
        limits = Limits(options.max_visual_tokens, options.max_text_tokens)
        segments = kv_segments(schedule, shape.decoder.layers, **vars(limits))
        interfaces = {"vision": _interface(vision, VISION_FILE, cpu_files), "language": _interface(language, LANGUAGE_FILE, cpu_files)}
        targets = {}
        for target in (target for target in options.targets if target in TARGETS):
            rtx = target == "tensorrt-rtx"
            targets[target] = build_target(
                target, folder, {name: parse_graph(interfaces, name) for name in interfaces}, segments, limits,
                compute_capabilities=options.compute_capabilities if rtx else (str(gpu_capability()),),
                plugins=None if rtx else folder / PLUGINS_FOLDER, progress=progress,
            )  # fmt: skip
        if VISION_TARGET in targets:
            vision_engine = parse_targets(json.loads(json.dumps(targets)))[VISION_TARGET].vision  # as the manifest will hold it
            write_vision_model(folder / REPOSITORY_FOLDER, repository_name(checkpoint.name), ENGINE_FROM_MODEL, vision_engine)
        if TENSORRT_LLM in options.targets:
            write_script(folder)
        progress("check sums", 0.0)
        manifest.update(
            format=MANIFEST_FORMAT,
            family=family_of(checkpoint.config).name,
            model={"name": checkpoint.name, "fingerprint": checkpoint.fingerprint},
            precision=options.precision,
            weights=options.weights,
            shape=shape.to_dict(),
            schedule=schedule.to_dict(),
            limits=vars(limits),
            segments=[vars(segment) for segment in segments],
            tokens=tokens,
            image_processor=vars(processor),
            graphs=interfaces,
            environment=_environment(time.monotonic() - started),
            **({"targets": targets} if targets else {}),
        )
    return open_engine(output, check_hashes=False)


def _check_types(options: BuildOptions) -> None:
    """Refuse numbers that what the engine is for does not compute with; what was tried is in docs/quality.md."""
    if options.precision == "bf16" and not set(TARGETS) & set(options.targets):
        raise EngineError(
            "--precision bf16: ONNX Runtime has no bf16 kernels for Gemm and Expand on the CPU; add --target tensorrt-rtx, or take fp16"
        )
    if options.weights == "full":
        return
    if "tensorrt" in options.targets:
        raise EngineError(
            f"--weights {options.weights}: untried on TensorRT, which builds on a GPU alone; take --target tensorrt-rtx, or leave it out"
        )
    if options.weights == "fp8" and "tensorrt-rtx" in options.targets:
        able = [float(capability) >= FP8_CAPABILITY for capability in options.compute_capabilities]  # numbers, as check_targets found
        if not (able and all(able)):
            raise EngineError(
                f"--weights fp8: TensorRT for RTX takes it from compute capability {FP8_CAPABILITY} on; say which with --compute-capability"
            )


def _check_limits(checkpoint: Checkpoint, options: BuildOptions) -> None:
    context = checkpoint.config.text_config.max_position_embeddings
    if options.max_text_tokens > context:
        raise CheckpointError(f"--max-text-tokens {options.max_text_tokens}: the model's context is {context} tokens")
    for capability in _kernel_capabilities(options):
        check_target(options.precision, capability)


def _kernel_capabilities(options: BuildOptions) -> tuple[str, ...]:
    """GPUs for which the ops' kernels are compiled: TensorRT runs them on the GPU here, TensorRT for RTX takes function bodies instead."""
    if "tensorrt" in options.targets:
        return (str(gpu_capability()),)
    return () if "tensorrt-rtx" in options.targets else options.compute_capabilities


def copy_text_files(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Tokenizer and chat template into the engine; returns the manifest's token ids."""
    source = checkpoint.path
    tokenizer = source / "tokenizer.json"
    if not tokenizer.is_file():
        raise CheckpointError(f"{tokenizer}: missing; save the tokenizer in its fast form beside the weights")
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    (folder / "chat_template.jinja").write_text(_chat_template(source), encoding="utf-8")
    generation = _json(source / "generation_config.json") if (source / "generation_config.json").exists() else {}
    stop = generation.get("eos_token_id", checkpoint.config.text_config.eos_token_id)
    stop_ids = list(stop or []) if isinstance(stop, (list, type(None))) else [stop]
    if not all(type(token) is int for token in stop_ids):
        raise CheckpointError(f"{source / 'generation_config.json'}: eos_token_id must be a token id or a list of them, got {stop!r:.60}")
    return {**image_token_ids(checkpoint.config), "stop": stop_ids}


def _chat_template(source: Path) -> str:
    """The chat template, from any of the three places where checkpoints keep it."""
    if (source / "chat_template.jinja").exists():
        return (source / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (source / name).exists():
            template = _json(source / name).get("chat_template")
            if isinstance(template, str):
                return template
    raise CheckpointError(f"{source}: no chat template (chat_template.jinja, chat_template.json or in tokenizer_config.json)")


def image_processor(checkpoint: Checkpoint, max_visual_tokens: int = DEFAULT_MAX_VISUAL_TOKENS) -> ImageProcessorConfig:
    """The checkpoint's image processor; larger images than ``max_visual_tokens`` are scaled down as its own limit would."""
    file = checkpoint.path / "preprocessor_config.json"
    if not file.exists():
        raise CheckpointError(f"{file}: missing; it says how images are scaled and normalised")
    try:
        config = ImageProcessorConfig.from_dict(_json(file))
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{file}: not an image processor ({error})") from None
    vision = checkpoint.config.vision_config
    if (config.patch_size, config.temporal_patch_size, config.merge_size) != (
        vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size,
    ):  # fmt: skip
        raise CheckpointError(f"{file}: patch_size, temporal_patch_size and merge_size must be those of vision_config in config.json")
    if not (len(config.image_mean) == len(config.image_std) == 3 and min(config.image_std) > 0 and 0 < config.min_pixels <= config.max_pixels):
        raise CheckpointError(f"{file}: image_mean and image_std must be three numbers (image_std positive), and 0 < min_pixels <= max_pixels")
    limit = max_visual_tokens * config.factor**2
    return replace(config, min_pixels=min(config.min_pixels, limit), max_pixels=min(config.max_pixels, limit))


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: must hold a JSON object")
    return values


def _interface(model: ir.Model, file: str, cpu_files: Mapping[str, str]) -> dict[str, Any]:
    return {
        "file": file,
        **({"cpu_file": cpu_files[file]} if file in cpu_files else {}),
        "inputs": [_tensor(value) for value in model.graph.inputs],
        "outputs": [_tensor(value) for value in model.graph.outputs],
    }


def _tensor(value: ir.Value) -> dict[str, Any]:
    assert value.dtype is not None and value.shape is not None
    sizes = [size if isinstance(size, int) else str(size.value) for size in value.shape]
    return {"name": value.name, "dtype": value.dtype.name.lower(), "shape": sizes}


def _environment(seconds: float) -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in ("vflow-export", "torch", "transformers", "onnx")}
    return {"python": platform.python_version(), **versions, "build_seconds": round(seconds, 1)}
