"""The first node of a graph at which two runs of it part: by halving the graph, a few tensors marked as outputs at a time.

A cut after c nodes splits a graph; the tensors that cross it are all that the rest computes from. If they agree, what differs later arises
later; if they differ, it arose before. So the search takes log₂(nodes) runs of each side, and never holds more than one cut in memory.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..engines.backends.onnxruntime import DISABLED_OPTIMIZERS, OnnxRuntimeBackend, session_options
from ..engines.graphs import Graph
from ..engines.manifest import Engine
from .comparison import compare

__all__ = ["Parting", "Probe", "RecordingBackend", "build_with_outputs", "engine_probe", "first_difference", "onnxruntime_probe", "with_outputs"]

Feed = Mapping[str, NDArray[Any]]
Probe = Callable[[Feed, Sequence[str]], Mapping[str, NDArray[Any]]]  # runs a graph once; the tensors of these names


@dataclass(frozen=True)
class Parting:
    """The first node whose output differs though all that it depends on agrees."""

    graph: str
    node: str
    op_type: str
    output: str
    worst: float
    allowed: float

    def __str__(self) -> str:
        difference = "another shape" if np.isinf(self.worst) else f"{self.worst:.3g} apart, {self.allowed:.3g} allowed"
        return f"{self.graph} graph, node {self.node} ({self.op_type}): its output {self.output} is the first that differs ({difference})"


def first_difference(name: str, model: onnx.ModelProto, feed: Feed, ours: Probe, reference: Probe, share: float) -> Parting | None:
    """Find the node; None where the graph's outputs agree.

    Args:
        name: of the graph, for the report; model: its nodes, in topological order; weights are not needed.
        feed: one input; ours, reference: the two sides.
        share: as :func:`compare`.
    """
    nodes, outputs = list(model.graph.node), {output.name for output in model.graph.output}
    last_use = {tensor: place for place, node in enumerate(nodes) for tensor in node.input}

    def differing(cut: int) -> Any:
        """The first tensor that crosses the cut and differs."""
        crossing = [t for n in nodes[:cut] for t in n.output if t and (t in outputs or last_use.get(t, -1) >= cut)]
        found = compare(ours(feed, crossing), reference(feed, crossing), share)
        return next((difference for difference in found if not difference.passed), None)

    agree, differ = 0, len(nodes)
    parting = differing(differ)
    if parting is None:
        return None
    while differ - agree > 1:
        middle = (agree + differ) // 2
        difference = differing(middle)
        if difference is None:
            agree = middle
        else:
            differ, parting = middle, difference
    node = nodes[differ - 1]
    return Parting(name, node.name, node.op_type, parting.name, parting.worst, parting.allowed)


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy whose outputs are these tensors alone."""
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    known = {value.name: value for value in model.graph.output}
    del marked.graph.output[:]
    marked.graph.output.extend(known.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    return marked


def onnxruntime_probe(model: onnx.ModelProto, folder: Path, *, optimized: bool = True) -> Probe:
    """ONNX Runtime on the CPU; ``folder`` has the weights. Without ``optimized`` every node is computed as it stands."""
    import onnxruntime

    options = session_options(onnxruntime)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL

    def run(feed: Feed, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        content = with_outputs(model, names).SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS)
        return dict(zip(names, session.run(list(names), dict(feed)), strict=True))

    return run


def engine_probe(engine: Engine, target: str, name: str) -> Probe:
    """An engine of the graph with those outputs, built anew for each call, and run by Polygraphy. **Not run anywhere yet**: that needs a GPU.

    Raises:
        EngineError: the network is not the graph, or the library refuses to build it.
    """
    from .tensorrt.graph import graph_for_target
    from .tensorrt.library import load_library

    graph = {"vision": engine.vision, "language": engine.language}[name]
    model, library = graph_for_target(target, engine.path / graph.file, engine.segments), load_library(target)

    def run(feed: Feed, names: Sequence[str]) -> Mapping[str, NDArray[Any]]:
        plan = build_with_outputs(engine, target, name, model, names)
        with library.loaders.TrtRunner(library.loaders.EngineFromBytes(plan)) as runner:
            outputs = runner.infer(dict(feed))
            return {output: np.array(outputs[output]) for output in names}

    return run


def build_with_outputs(engine: Engine, target: str, name: str, model: onnx.ModelProto, names: Sequence[str]) -> Any:
    """The serialized engine of a graph with further outputs; attention is set right as in the one that is run.

    Its own outputs stay, since the library updates only caches that are outputs.
    """
    from .tensorrt.engine import build_serialized
    from .tensorrt.library import load_library
    from .tensorrt.network import parse_graph_file, patch_attention

    built = getattr(engine.targets[target], name)
    with tempfile.TemporaryDirectory(prefix="vflow-bisect-") as folder:
        file = Path(folder) / f"{name}.onnx"
        onnx.save(model, file)
        for weights in {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}:
            _beside(engine.path / weights, Path(folder) / weights)
        parsed = parse_graph_file(load_library(target), file)
        patch_attention(parsed)
        tensors, outputs = parsed.tensors(), {tensor.name for tensor in parsed.outputs()}
        for output in set(names) - outputs:
            parsed.network.mark_output(tensors[output])
        return build_serialized(parsed, built.inputs, built.profiles, engine.targets[target].compute_capabilities)


def _beside(source: Path, link: Path) -> None:
    """A link where there can be one: weights are large."""
    try:
        link.symlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, link)


class RecordingBackend(OnnxRuntimeBackend):
    """ONNX Runtime, and what each call of a graph was fed, by the names of the graph's inputs: ``calls`` of (graph, feed).

    A feed of the language graph has the caches as they were before the call.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, provider="cpu", standard=True)
        self._graphs = {"vision": engine.vision, "language": engine.language}
        self.calls: list[tuple[str, dict[str, NDArray[Any]]]] = []

    def vision(self, pixel_values: NDArray[np.floating[Any]], entropy: NDArray[np.float32], budget: int) -> Any:
        self._record("vision", {"pixel_values": pixel_values.astype(self.dtype), "entropy": entropy, "budget_tokens": np.zeros(budget, np.int32)})
        return super().vision(pixel_values, entropy, budget)

    def language(self, *, visual_embeds: NDArray[Any], budget: int, slot: int = 0, **inputs: NDArray[Any]) -> Any:
        embeds = visual_embeds.astype(self.dtype)
        caches = {name: value.numpy().copy() for name, value in self._caches.items()}
        self._record("language", {**inputs, **caches, "visual_embeds": embeds, "budget_tokens": np.zeros(budget, np.int32)})
        return super().language(visual_embeds=visual_embeds, budget=budget, slot=slot, **inputs)

    def _record(self, name: str, feed: dict[str, NDArray[Any]]) -> None:
        graph: Graph = self._graphs[name]
        self.calls.append((name, {tensor: np.ascontiguousarray(feed[tensor]) for tensor in graph.input_names}))
