"""Engines of both graphs for the targets of a build: what can be built here is asked first, then each engine is built in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import util
from pathlib import Path
from typing import Any

import onnx

from ...engines.backends.cuda import gpu_capability
from ...engines.errors import EngineError
from ...engines.graphs import GRAPHS, TARGETS, Graph, Profile
from ...engines.manifest import Limits, Segment
from ..child_process import last_words
from .engine import EngineJob
from .graph import engine_interface, graph_for_target
from .library import MODULES, SWITCH
from .profiles import language_profiles, vision_profiles

__all__ = ["RTX_CAPABILITIES", "build_target", "check_targets"]

# Compute capabilities that TensorRT for RTX builds for; without any it builds for 8.0, 8.6, 8.9 and from 12.0 on.
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
POLL_SECONDS = 0.1


def check_targets(targets: Sequence[str], capabilities: Sequence[str]) -> None:
    """Refuse targets that cannot be built here, before anything is; those for which no engines are built always can.

    Raises:
        EngineError: a package or a GPU is missing, or a compute capability is not one that TensorRT for RTX builds for.
    """
    for target in (target for target in TARGETS if target in targets):
        missing = [name for name in (MODULES[target], "polygraphy") if util.find_spec(name) is None]
        if target == "tensorrt" and gpu_capability() is None:
            raise EngineError(
                "--target tensorrt builds on an NVIDIA GPU and there is none here; build there, or for --target tensorrt-rtx, which needs none"
            )
        if missing:
            raise EngineError(f"--target {target} needs {' and '.join(missing)}; pip install 'vflow-export[{target}]'")
        for capability in capabilities if target == "tensorrt-rtx" else ():
            if capability not in RTX_CAPABILITIES:
                raise EngineError(f"--compute-capability {capability}: TensorRT for RTX builds for {', '.join(RTX_CAPABILITIES)}")


def build_target(
    target: str,
    folder: Path,
    graphs: dict[str, Graph],
    segments: Sequence[Segment],
    limits: Limits,
    *,
    compute_capabilities: Sequence[str] = (),
    plugins: Path | None = None,
    progress: Callable[[str, float], None] = lambda phase, share: None,
) -> dict[str, Any]:
    """Build the engines of both graphs into ``folder``/``target``.

    Args:
        folder: with the graphs and their weights; graphs: by name.
        compute_capabilities: TensorRT for RTX: GPUs that the engines are for; TensorRT: the GPU here, for which ``plugins`` holds the kernels.
        progress: called again and again; what it raises ends the build.

    Returns:
        The target's entry of the manifest.

    Raises:
        EngineError: a graph cannot be built; OSError: disk full and the like.
    """
    (folder / target).mkdir()
    profiles = {"vision": vision_profiles(limits), "language": language_profiles(segments, limits)}
    entry: dict[str, Any] = {"versions": {}, "compute_capabilities": list(compute_capabilities)}
    for name in GRAPHS:
        job = _job(target, folder, name, graphs[name], segments, profiles[name], tuple(compute_capabilities), plugins)
        parsed_file = Path(job.graph)
        onnx.save(graph_for_target(target, folder / graphs[name].file, segments), parsed_file)
        try:
            result = _run(job, lambda name=name: progress(f"build {target} {name}", 0.0))  # type: ignore[misc]
        finally:
            parsed_file.unlink(missing_ok=True)
        entry["versions"] = result.pop("versions")
        files = {
            key: f"{target}/{Path(getattr(job, attribute)).name}" for key, attribute in (("file", "engine"), ("log", "log"), ("layers", "layers"))
        }
        interface = asdict(job)
        entry[name] = {**files, **{key: interface[key] for key in ("inputs", "outputs", "profiles")}, **result}
    return entry


def _job(
    target: str, folder: Path, name: str, graph: Graph, segments: Sequence[Segment], profiles: Sequence[Profile], capabilities: tuple[str, ...],
    plugins: Path | None,
) -> EngineJob:  # fmt: skip
    inputs, outputs = engine_interface(graph, segments)
    used = {size for tensor in inputs for size in tensor.shape if isinstance(size, str)}
    return EngineJob(
        target=target,
        graph=str(folder / f".{target}-{graph.file}"),  # beside the weights, where the parser looks for them
        engine=str(folder / target / f"{name}.engine"),
        log=str(folder / target / f"{name}.log"),
        layers=str(folder / target / f"{name}.layers.json"),
        inputs=inputs,
        outputs=outputs,
        profiles=tuple(Profile(p.name, {size: numbers for size, numbers in p.sizes.items() if size in used}) for p in profiles),
        compute_capabilities=capabilities,
        plugins=str(plugins) if plugins is not None else "",
    )


def _run(job: EngineJob, waiting: Callable[[], None]) -> dict[str, Any]:
    """Build one engine in a process of its own, which ends with this one, whatever ends it."""
    environment = {**os.environ, SWITCH: str(int(job.target == "tensorrt-rtx")), "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.engine"], stdin=subprocess.PIPE, stdout=answer, stderr=complaints, env=environment
        )
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has died already, which the missing answer says
                process.stdin.write(json.dumps(job.to_dict()).encode() + b"\n")
                process.stdin.flush()
            while process.poll() is None:
                waiting()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        answer.seek(0)
        lines, graph = answer.read().decode().splitlines(), Path(job.log).stem
        if not lines:
            raise EngineError(f"{job.target} died building the {graph} graph ({last_words(complaints, process.returncode)})")
    result: dict[str, Any] = json.loads(lines[-1])
    if "errno" in result:
        raise OSError(result["errno"], os.strerror(result["errno"]), job.engine)
    if "error" in result:
        raise EngineError(f"{graph} graph: {result['error']}")
    return result
