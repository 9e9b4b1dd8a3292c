"""One TensorRT engine from one graph: what a process of its own does (``targets`` starts it, one for each engine).

Of its own, because Polygraphy serves one of the two libraries in a process, because the build's memory is then its own to measure and is given
back, and because a build cannot be interrupted from inside: ending the process ends it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import onnx

from ...engines.errors import EngineError
from ...engines.graphs import Profile, TensorInfo
from .library import Library, load_library
from .network import Parsed, check_network, layer_report, parse_graph_file, patch_attention

__all__ = ["EngineJob", "build_serialized", "check_log", "main", "run_job"]

# Warnings that mean a wrong or failing engine. What else the library warns of stays in the build log.
REFUSED = re.compile(r"\bunused\b|not self-consistent|exceeds the maximum value", re.IGNORECASE)
LENGTH_ONLY = re.compile(r"Input Tensor (survivors|cells|budget_tokens) is unused or used only at compile-time")
LOG_SEVERITY = "INFO"


@dataclass(frozen=True)
class EngineJob:
    """What to build, and where; all of it can be written as JSON.

    Attributes:
        target: ``tensorrt-rtx`` or ``tensorrt``; graph: file that is parsed, weights beside it.
        engine, log, layers: files to write.
        inputs, outputs: what the engine is to have.
        compute_capabilities: for TensorRT for RTX, the GPUs that the engine is for; none leaves it to the library.
        plugins: folder of compiled kernels, for TensorRT; empty for none.
    """

    target: str
    graph: str
    engine: str
    log: str
    layers: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    profiles: tuple[Profile, ...]
    compute_capabilities: tuple[str, ...] = ()
    plugins: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineJob:
        tensors: dict[str, Any] = {
            side: tuple(TensorInfo(t["name"], t["dtype"], tuple(t["shape"])) for t in values[side]) for side in ("inputs", "outputs")
        }
        profiles = tuple(Profile(p["name"], {name: tuple(sizes) for name, sizes in p["sizes"].items()}) for p in values["profiles"])
        names = {field.name for field in fields(cls)} - {"inputs", "outputs", "profiles", "compute_capabilities"}
        capabilities = tuple(values["compute_capabilities"])
        return cls(**{name: values[name] for name in names}, **tensors, profiles=profiles, compute_capabilities=capabilities)


def run_job(job: EngineJob) -> dict[str, Any]:
    """Build an engine and write it, its log and its layers.

    Returns:
        ``engine_bytes``, ``build_seconds``, ``peak_memory_bytes`` (None where this system does not say), ``versions``.

    Raises:
        EngineError: the network is not the graph, or the library refuses to build it; the log is written all the same.
    """
    started = time.monotonic()
    library = load_library(job.target)
    if job.plugins:
        from ...plugins.tensorrt import register_plugins

        register_plugins(Path(job.plugins), job.compute_capabilities[0])
    try:
        parsed = parse_graph_file(library, Path(job.graph))
        patch_attention(parsed)
        check_network(parsed, job.inputs, job.outputs)
        Path(job.layers).write_text(json.dumps(layer_report(parsed), indent=0), encoding="utf-8")
        serialized = build_serialized(parsed, job.inputs, job.profiles, job.compute_capabilities)
        check_log(library)
    finally:
        text = "\n".join(library.said(LOG_SEVERITY)) + "\n"
        Path(job.log).write_text(text.replace(str(Path(job.graph).parent) + os.sep, ""), encoding="utf-8")  # no paths of this machine in an engine
    with Path(job.engine).open("wb") as file:
        file.write(serialized)  # as it lies in memory: a copy of it would be as large as the weights
    return {
        "engine_bytes": Path(job.engine).stat().st_size,
        "build_seconds": round(time.monotonic() - started, 1),
        "peak_memory_bytes": _peak_memory(),
        "versions": _versions(library),
    }


def build_serialized(parsed: Parsed, inputs: Sequence[TensorInfo], profiles: Sequence[Profile], capabilities: Sequence[str] = ()) -> Any:
    """The serialized engine, a buffer.

    Raises:
        EngineError: the library refuses to build it; the message holds its own first error.
    """
    library = parsed.library
    boxes = []
    for profile in profiles:
        box = library.loaders.Profile()
        for tensor in inputs:
            box.add(tensor.name, *profile.shapes(tensor))
        boxes.append(box)
    options: dict[str, Any] = {"profiles": boxes}
    if library.target == "tensorrt-rtx" and capabilities:
        options["compute_capabilities"] = [tuple(map(int, capability.split("."))) for capability in capabilities]
    create_config = library.create_config(**options)

    def configuration(builder: Any, network: Any) -> Any:
        config = create_config(builder, network)
        config.clear_flag(library.trt.BuilderFlag.TF32)  # float32 is to mean float32
        return config

    try:
        return library.loaders.engine_bytes_from_network((parsed.builder, parsed.network, parsed.parser), config=configuration)
    except library.failure as error:
        errors = library.said("ERROR")
        raise EngineError(f"{library.target} does not build it: {errors[0].strip().splitlines()[0] if errors else error}") from None


def check_log(library: Library) -> None:
    """Refuse what the library warned of and built all the same.

    Raises:
        EngineError: with the warning.
    """
    for line in library.said("WARNING"):
        if REFUSED.search(line) and not LENGTH_ONLY.search(line):
            raise EngineError(f"{library.target} warns: {line.strip().splitlines()[0]}")


def _peak_memory() -> int | None:
    """Most bytes that this process has held in memory."""
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _versions(library: Library) -> dict[str, str]:
    from importlib import metadata

    return {library.trt.__name__: str(library.trt.__version__), "polygraphy": metadata.version("polygraphy"), "onnx": onnx.__version__}


def main() -> None:
    """Read a job from stdin's first line, and answer it in one line on stdout: the result, {"error": message}, or {"errno": number} of the system.

    Stdin stays open as long as whoever started this wants the engine; when it closes, this process ends, build or no build.
    """
    job = EngineJob.from_dict(json.loads(sys.stdin.readline()))
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = run_job(job)
    except EngineError as error:
        result = {"error": str(error)}
    except OSError as error:
        if error.errno is None:
            raise
        result = {"errno": error.errno}
    print(json.dumps(result), file=answer, flush=True)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
