"""Weights in fewer bits: what is stored, what both runtimes make of it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support import DECODER_STAGES, MAX_TEXT_TOKENS, MAX_VISUAL_TOKENS, picture
from vflow.engines import Session
from vflow.engines.errors import EngineError
from vflow.engines.manifest import WEIGHTS, Engine
from vflow.exporter.bisection import onnxruntime_probe
from vflow.exporter.build import BuildOptions, build_engine
from vflow.exporter.checkpoint import TensorReader, open_checkpoint
from vflow.exporter.verify import VerifyInput, verify_engine
from vflow.exporter.weights import BLOCK, dequantize, quantize, scale_shape

FEWER = [weights for weights in WEIGHTS if weights != "full"]
# Half a step of the code, of the largest weight that shares its scale: 1/254 and 1/14; e4m3 has three bits behind the point, so 2⁻⁴ of each number.
ROUNDING = {"int8": 0.5 / 127, "int4": 0.5 / 7, "fp8": 2**-4}


@pytest.fixture(scope="module")
def quantized(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Engine]:
    """``quantized(weights, precision)``: the small random model, built once for equal arguments."""
    built: dict[tuple[str, str], Engine] = {}

    def make(weights: str, precision: str = "fp32") -> Engine:
        if (weights, precision) not in built:
            options = BuildOptions(precision, MAX_VISUAL_TOKENS, MAX_TEXT_TOKENS, weights=weights)
            output = tmp_path_factory.mktemp(weights) / "engine"
            built[weights, precision] = build_engine(open_checkpoint(str(random_checkpoint)), DECODER_STAGES, output, options)
        return built[weights, precision]

    return make


@pytest.mark.parametrize("weights", FEWER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_scales_restore_each_weight_to_half_a_step(weights: str, dtype: torch.dtype) -> None:
    weight = torch.randn(2 * BLOCK, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, scales = quantize(weight, weights)
    assert codes.shape == weight.shape and scales.shape == scale_shape(*weight.shape, weights) and scales.dtype is dtype
    largest = weight.float().abs().reshape(*((2, BLOCK) if weights == "int4" else (1, 2 * BLOCK)), 5).amax(1, keepdim=True)
    error = (dequantize(codes, scales, weights).float() - weight.float()).abs().reshape(len(largest), -1, 5)
    rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]  # of the scale, and of the product
    assert (error <= (ROUNDING[weights] + 2 * rounding) * largest + 1e-6).all()


@pytest.mark.parametrize("weights", FEWER)
def test_a_channel_of_zeros_stays_zero(weights: str) -> None:
    weight = torch.zeros(BLOCK, 3)
    assert torch.equal(dequantize(*quantize(weight, weights), weights), weight)


@pytest.mark.parametrize("weights", FEWER)
def test_the_largest_weight_of_a_faint_channel_is_not_clipped(weights: str) -> None:
    """In fp16 their scales are subnormal, and rounded to the nearest they were up to all too small."""
    faint = torch.tensor([6e-8, 2.5e-6, 3.5e-6, 1.13e-5, 3.9e-5, 1e-3]).half()
    weight = torch.linspace(-1, 1, BLOCK)[:, None].half() * faint
    codes, scales = quantize(weight, weights)
    largest = {"int8": 127, "int4": 7, "fp8": 448}[weights]
    assert (scales.double() * largest >= weight.double().abs().amax(0) * (1 - 2**-10)).all()
    off = (dequantize(codes, scales, weights).double() - weight.double()).abs()
    assert (off <= scales.double() * (448 * 2**-4 if weights == "fp8" else 0.5) + 2**-24).all()  # a step of float16 itself


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("weights", FEWER)
def test_onnx_runtime_reads_the_stored_codes_as_they_were_meant(quantized: Callable[..., Engine], weights: str, precision: str) -> None:
    """Packing, order and axis: each restored weight of the graph against the checkpoint's."""
    engine = quantized(weights, precision)
    model = onnx.load(engine.path / "language.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    layers = engine.shape.decoder.layers
    assert len(nodes) == (7 if weights != "int4" else 6) * layers  # the down projection has 48 inputs: no whole blocks
    assert engine.weights == weights
    session = Session(engine)
    feed = {name: np.zeros([1 if isinstance(size, str) else size for size in shape], dtype) for name, shape, dtype in _inputs(engine)}
    restored = onnxruntime_probe(model, engine.path, optimized=False)(feed, [node.output[0] for node in nodes])
    checkpoint = open_checkpoint(engine.model_name)
    with TensorReader(checkpoint) as reader:
        for name, values in restored.items():
            weight = reader.read(name.removesuffix(".T.restored")).to(getattr(torch, {"fp32": "float32", "fp16": "float16"}[precision])).T
            expected = dequantize(*quantize(weight, weights), weights).numpy()
            np.testing.assert_array_equal(values, expected)
    assert session.generate("how many objects are there ?", [picture(6, 5)], max_new_tokens=2).token_ids


def _inputs(engine: Engine) -> list[tuple[str, tuple[Any, ...], Any]]:
    kinds = {"float": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32}
    return [(tensor.name, tensor.shape, kinds[tensor.dtype]) for tensor in engine.language.inputs]


@pytest.mark.parametrize("weights", ["int8", *(pytest.param(weights, marks=pytest.mark.slow) for weights in ("int4", "fp8"))])
def test_such_an_engine_is_the_model_with_those_weights(quantized: Callable[..., Engine], random_checkpoint: Path, weights: str) -> None:
    """To the tolerances of whole weights: a product with activations of 8 bits, which ONNX Runtime would take, is caught."""
    findings = verify_engine(
        quantized(weights), open_checkpoint(str(random_checkpoint)), [VerifyInput(picture(6, 5), "how many objects are there ?")]
    )
    assert [finding.quantity for finding in findings if not finding.passed] == []


def test_weights_that_are_few_or_shared_stay_whole(quantized: Callable[..., Engine]) -> None:
    for name in ("vision", "language"):
        model = onnx.load(quantized("int8").path / f"{name}.onnx", load_external_data=False)
        stored = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
        assert all(tensor.startswith("language_model.layers.") for tensor in stored if tensor.endswith((".int8", ".scales")))
        assert name == "vision" or "language_model.embed_tokens.weight" in stored


# ------------------------------------------------------------------------------------------------------ TensorRT for RTX


@pytest.fixture
def parsed(quantized: Callable[..., Engine]) -> Callable[[str], Any]:
    """``parsed("int8")``: the language graph with such weights as a network."""
    pytest.importorskip("tensorrt_rtx")
    from vflow.exporter.tensorrt.graph import graph_for_target
    from vflow.exporter.tensorrt.library import load_library
    from vflow.exporter.tensorrt.network import parse_graph_file, patch_attention

    def make(weights: str) -> Any:
        engine = quantized(weights)
        file = engine.path / ".language-under-test.onnx"  # beside the weights
        onnx.save(graph_for_target("tensorrt-rtx", engine.path / "language.onnx", engine.segments), file)
        try:
            network = parse_graph_file(load_library("tensorrt-rtx"), file)
        finally:
            file.unlink()
        patch_attention(network)
        return network

    return make


@pytest.mark.parametrize("weights", FEWER)
def test_a_network_restores_every_weight_as_the_graph_says(quantized: Callable[..., Engine], parsed: Callable[[str], Any], weights: str) -> None:
    from vflow.exporter.tensorrt.graph import engine_interface
    from vflow.exporter.tensorrt.network import NetworkError, check_network

    engine, network = quantized(weights), parsed(weights)
    interface = engine_interface(engine.language, engine.segments)
    check_network(network, *interface)
    node = next(node for node in network.model.graph.node if node.op_type == "DequantizeLinear")
    name, place = ("block_size", 16) if weights == "int4" else ("axis", 0)
    next(attribute for attribute in node.attribute if attribute.name == name).i = place
    with pytest.raises(NetworkError, match=f"weight of {node.name}: .*, the graph's "):
        check_network(network, *interface)
    node.op_type = "Identity"
    with pytest.raises(NetworkError, match=r"the network restores (\d+) weights, the graph (?!\1)\d+"):
        check_network(network, *interface)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["full", "int4"])
def test_bf16_engines_are_built_for_tensorrt_rtx(random_checkpoint: Path, tmp_path: Path, weights: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = BuildOptions("bf16", MAX_VISUAL_TOKENS, MAX_TEXT_TOKENS, targets=("tensorrt-rtx",), weights=weights)
    engine = build_engine(open_checkpoint(str(random_checkpoint)), DECODER_STAGES, tmp_path / "engine", options)
    dtypes = {tensor.name: tensor.dtype for tensor in engine.targets["tensorrt-rtx"].language.inputs}
    assert dtypes["past_key_values.0.key"] == dtypes["visual_embeds"] == "bfloat16"
    with pytest.raises(EngineError, match=r"is bf16, for which ONNX Runtime has no kernels; run it with its target, or build it in fp16$"):
        Session(engine)


# ------------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16"}, r"^--precision bf16: ONNX Runtime has no bf16 kernels .* add --target tensorrt-rtx, or take fp16$"),
        ({"weights": "fp8", "targets": ("tensorrt-rtx",)}, r"^--weights fp8: TensorRT for RTX takes it from compute capability 8.9 on"),
        ({"weights": "fp8", "targets": ("tensorrt-rtx",), "compute_capabilities": ("8.9", "8.6")}, r"^--weights fp8: TensorRT for RTX takes it from"),
    ],
)
def test_what_an_engine_could_not_compute_is_refused_before_anything_is_traced(
    random_checkpoint: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if "targets" in options:
        pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineError, match=message):
        build_engine(open_checkpoint(str(random_checkpoint)), DECODER_STAGES, tmp_path / "engine", BuildOptions(**options))
    assert list(tmp_path.iterdir()) == []
