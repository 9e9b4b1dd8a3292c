"""Whole engines for ``gpu_check.py``: the small model for correctness, a large one with random weights for speed, pruned beside unpruned.

The random model is made where this runs (``make_model.py``), so nothing large travels: 7B in fp16 takes 17 GB of disk for the
checkpoint, 17 GB for each of the two engine directories and as much again for each target, and they are removed one after the other.
"""

from __future__ import annotations

import gc
import importlib
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from vflow.engines import Session
from vflow.engines.manifest import Engine
from vflow.exporter.build import BuildOptions, build_engine
from vflow.exporter.checkpoint import Checkpoint, open_checkpoint
from vflow.exporter.models import model_shape
from vflow.exporter.presets import preset_schedule
from vflow.exporter.schedule import KEEP_UNIT, Schedule, Stage, unpruned_schedule
from vflow.exporter.tensorrt.library import MODULES
from vflow.exporter.verify import generated_inputs
from vflow.exporter.verify_target import verify_target

__all__ = ["PAPER", "Runtime", "available_runtimes", "check_model", "compare_speed", "large_model", "schedules", "unsupported_gpu"]

PAPER = "paper: 3.8 times faster, 89 % less KV memory at 90 % pruned"  # arXiv 2508.05211, abstract; another model, device and data
KEEP = 0.1
PRESETS = ("progressive", "tower")
SMALL_MODELS = ("tiny", "tiny-2.5", "tiny-3")  # one of each family
PROMPT = "how many objects are there ?"
TEXT_TOKENS, NEW_TOKENS = 64, 17
CHECKED_INPUTS = 5
REPEATS = 5  # after one that warms up; medians are told

Runtime = tuple[str, dict[str, str]]  # name, and the arguments of Session


def available_runtimes(device: str) -> Iterator[tuple[Runtime, str]]:
    """Every runtime that the report has a line for, and why it cannot be tried; empty where it can."""
    if device == "cpu":
        yield ("onnxruntime CPU", {"provider": "cpu"}), ""
        return
    import onnxruntime

    cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    yield ("onnxruntime CUDA", {"provider": "cuda"}), "" if cuda else "the installed onnxruntime has no CUDA"
    for target, module in MODULES.items():
        missing = [name for name in (module, "polygraphy", "cuda") if util.find_spec(name) is None]
        reason = f"{' and '.join(missing)} missing" if missing else unsupported_gpu(importlib.import_module(module))
        yield (target, {"target": target}), reason


def unsupported_gpu(library: Any) -> str:
    """Why TensorRT-RTX cannot run an engine on this GPU (it knows consumer generations alone); empty if it can, and for TensorRT."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    known = getattr(library, "ComputeCapability", None)
    if known is None or hasattr(known, f"SM{major}{minor}"):
        return ""
    return f"{library.__name__} {library.__version__} does not support GPUs of compute capability {major}.{minor}"


def large_model(shape: str, folder: Path, device: str) -> Checkpoint:
    """The small model, or one of a public shape with random weights, drawn on the device."""
    if shape == "tiny":
        return open_checkpoint("tiny")
    tool = Path(__file__).with_name("make_model.py")
    subprocess.run([sys.executable, str(tool), "--shape", shape, "--output", str(folder), "--device", device], check=True)
    return open_checkpoint(str(folder))


def schedules(checkpoint: Checkpoint) -> dict[str, Schedule]:
    """Unpruned first, then what drops nine tokens in ten."""
    shape = model_shape(checkpoint.config)
    presets = {name: preset_schedule(name, shape, KEEP, fingerprint=checkpoint.fingerprint) for name in PRESETS}
    merged = Schedule((Stage("decoder", 0, int(KEEP * KEEP_UNIT), 4.0),), proportional_attention=2.0)  # attention with a mask instead of causality
    return {"unpruned": unpruned_schedule(), **presets, "merged": merged}


def check_model(checkpoint: Checkpoint, schedule: Schedule, runtime: Runtime, folder: Path) -> dict[str, Any]:
    """An engine of the small model on this runtime against ONNX Runtime on the CPU."""
    name, arguments = runtime
    engine = _build(checkpoint, schedule, arguments, folder, visual_tokens=256)
    findings = verify_target(Session(engine, **arguments), name, generated_inputs(CHECKED_INPUTS))
    differences = {finding.quantity: float(f"{finding.worst:.2e}") for finding in findings}
    return {"passed": all(finding.passed for finding in findings), **differences}


def compare_speed(
    checkpoint: Checkpoint,
    runtime: Runtime,
    sides: Sequence[int],
    folder: Path,
    report: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]],
) -> None:
    """Time to first token and decoding of every schedule, a row each, beside the unpruned one's.

    Args:
        sides: of square images, in visual tokens.
        report: adds a row: name, and what gives its values.
    """
    base: dict[int, dict[str, Any]] = {}
    for name, schedule in schedules(checkpoint).items():
        place = folder / name
        built = report(f"{runtime[0]} {name} build", lambda: _built(checkpoint, schedule, runtime[1], place, max(sides) ** 2))  # noqa: B023
        if built.get("error"):
            continue
        session: list[Session] = []
        for side in sides:
            row = report(f"{runtime[0]} {name} {side * side} tokens", lambda: _measure(session, place, runtime[1], side, base.get(side)))  # noqa: B023
            if name == "unpruned" and not row.get("error"):
                base[side] = row
        session.clear()
        gc.collect()  # the next engine needs its memory
        shutil.rmtree(place)  # and so does its disk


def _built(checkpoint: Checkpoint, schedule: Schedule, arguments: dict[str, str], folder: Path, visual_tokens: int) -> dict[str, Any]:
    engine = _build(checkpoint, schedule, arguments, folder, visual_tokens=visual_tokens)
    return {"passed": None, "gb": round(sum(entry.size for entry in engine.files.values()) / 1e9, 2)}


def _build(checkpoint: Checkpoint, schedule: Schedule, arguments: dict[str, str], folder: Path, *, visual_tokens: int) -> Engine:
    targets = (arguments["target"],) if "target" in arguments else ()
    precision = "fp32" if arguments.get("provider") == "cpu" else "fp16"
    return build_engine(checkpoint, schedule, folder, BuildOptions(precision, visual_tokens, TEXT_TOKENS, targets=targets))


def _measure(held: list[Session], folder: Path, arguments: dict[str, str], side: int, base: dict[str, Any] | None) -> dict[str, Any]:
    """Medians of one image size; the session is loaded once and held."""
    from vflow.engines import open_engine

    if not held:
        held.append(Session(open_engine(folder, check_hashes=False), **arguments))
    pixels_a_side = side * held[0].engine.image_processor.factor
    pixels = np.random.default_rng(side).integers(0, 256, (pixels_a_side, pixels_a_side, 3), dtype=np.uint8)
    runs = [held[0].generate(PROMPT, [pixels], max_new_tokens=NEW_TOKENS) for _ in range(1 + REPEATS)][1:]
    found: dict[str, Any] = {"passed": None, "visual_tokens": runs[0].visual_tokens, "kept": [stage.kept for stage in runs[0].stages]}
    for name in ("vision_s", "prefill_s", "ttft_s"):
        found[name] = round(statistics.median(getattr(run, name) for run in runs), 5)
    spread = [run.ttft_s for run in runs]
    found["ttft_spread"] = round(max(spread) / min(spread) - 1, 3)
    speeds = [run.tokens_per_s for run in runs if run.tokens_per_s is not None]
    found["tokens_per_s"] = round(statistics.median(speeds), 2) if speeds else None
    found["kv_visual_bytes"] = runs[0].kv_bytes.visual
    if base is not None:
        found["times_faster"] = round(base["ttft_s"] / found["ttft_s"], 2)
        found["kv_saved"] = round(1 - found["kv_visual_bytes"] / base["kv_visual_bytes"], 3)
        found["beside"] = PAPER
    return found
