"""Parses and builds ONNX graphs with TensorRT-RTX on the CPU, and reads what the parsed network holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from vflow.exporter.tensorrt.library import load_library

trt = pytest.importorskip("tensorrt_rtx")
pytest.importorskip("polygraphy")
LIBRARY = load_library("tensorrt-rtx")  # with the logger that all builders of this process have: only the first is ever used

# What the parser and builder say without anything being wrong.
HARMLESS = re.compile(
    "differs from one already registered|Make sure (in|out)put .* has Int64 binding"
    "|already exists, the output tensors of this new instance will not be queryable"  # a function used twice is inlined twice
)
LENGTH_ONLY = re.compile(r"Input Tensor (survivors|cells|budget_tokens) is unused or used only at compile-time")


class Parsed:
    """A network that the ONNX parser made; ``complaints`` are its warnings that matter."""

    def __init__(self, model: bytes, path: str = "") -> None:
        LIBRARY.log.clear()
        logger = LIBRARY.loaders.get_trt_logger()
        self.builder = trt.Builder(logger)
        self.network = self.builder.create_network(0)
        self.parser = trt.OnnxParser(self.network, logger)
        parsed = self.parser.parse(model, path) if path else self.parser.parse(model)
        errors = [self.parser.get_error(i).desc() for i in range(self.parser.num_errors)]
        assert parsed, errors

    def layers(self) -> Iterator[Any]:
        for number in range(self.network.num_layers):
            yield self.network.get_layer(number)

    def kinds(self) -> Counter[str]:
        return Counter(layer.type.name for layer in self.layers())

    def attentions(self) -> list[Any]:
        found = []
        for layer in self.layers():
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = trt.IAttentionInputLayer
                found.append(layer)
        return found

    def constants(self) -> set[float]:
        """Values of the one-element floating-point constants."""
        values = set()
        for layer in self.layers():
            if layer.type == trt.LayerType.CONSTANT:
                layer.__class__ = trt.IConstantLayer
                weights = np.asarray(layer.weights)
                if weights.size == 1 and weights.dtype.kind == "f":
                    values.add(float(weights.reshape(())))
        return values

    def build(self, sizes: Callable[[str, list[int]], list[tuple[int, ...]]]) -> bytes:
        """The engine, for the sizes (least, usual, most) that ``sizes`` gives each input; attention may be decomposed, as our builds have it."""
        for layer in self.attentions():
            layer.attention.decomposable = True
        configuration, profile = self.builder.create_builder_config(), self.builder.create_optimization_profile()
        for number in range(self.network.num_inputs):
            tensor = self.network.get_input(number)
            profile.set_shape(tensor.name, *sizes(tensor.name, list(tensor.shape)))
        configuration.add_optimization_profile(profile)
        engine = self.builder.build_serialized_network(self.network, configuration)
        assert engine is not None, LIBRARY.said("WARNING")
        return bytes(engine)

    @property
    def complaints(self) -> list[str]:
        return [line for line in LIBRARY.said("WARNING") if not HARMLESS.search(line) and not LENGTH_ONLY.search(line)]
