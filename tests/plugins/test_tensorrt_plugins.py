"""The quick plugins pass NVIDIA's registration checks, in the published Python bindings over libraries that hold nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from test_compile import OPS
from vflow.plugins import compaction, importance
from vflow.plugins import tensorrt as tensorrt_plugins
from vflow.plugins.contract import PRECISIONS, ContractError
from vflow.plugins.tensorrt import register_plugins, with_plugins

# Every symbol that the bindings take from the native libraries; nothing here calls one.
SYMBOLS = [
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL", "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
]  # fmt: skip
LIBRARIES = ["libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11"]
SCRIPT = Path(__file__).with_name("register_with_tensorrt.py")
SELECTIONS = {"KeepTop", "KeepTopPerCell", "GroupTokens"}  # the same for all precisions
NAMES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}


@pytest.fixture(scope="session")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which ``import tensorrt`` works without TensorRT."""
    found = importlib.util.find_spec("tensorrt_bindings")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if found is None or found.origin is None or compiler is None:
        pytest.skip("needs a C compiler and: pip install --no-deps tensorrt-cu13-bindings")
    folder = tmp_path_factory.mktemp("tensorrt")
    source = folder / "stubs.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for library in LIBRARIES:
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(folder / library), str(source)], check=True)
    (folder / "tensorrt").symlink_to(Path(found.origin).parent)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)}


@pytest.fixture(scope="session")
def registered(bindings: dict[str, str], compiled: dict[str, Path]) -> list[dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), "9.0", *(str(compiled[precision]) for precision in PRECISIONS)]
    result = subprocess.run(command, env=bindings, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_every_op_registers_in_every_precision(registered: list[dict[str, Any]]) -> None:
    assert {(plugin["op"], plugin["precision"]) for plugin in registered} == {(op, precision) for op in OPS for precision in PRECISIONS}


def test_inputs_and_attributes_are_those_of_the_onnx_nodes(registered: list[dict[str, Any]]) -> None:
    """The parser hands a node's inputs over by place and its attributes by name."""
    from onnx_ops import FUNCTIONS

    for plugin in registered:
        function = FUNCTIONS[plugin["op"]]
        assert plugin["inputs"] == list(function.input)
        assert plugin["attributes"] == {attribute.name: "float" for attribute in function.attribute_proto}


def test_outputs_have_the_types_and_ranks_of_the_onnx_nodes(registered: list[dict[str, Any]]) -> None:
    from onnx_ops import OUTPUTS

    for plugin in registered:
        expected = [[{"float32": "FLOAT", "int64": "INT64", None: NAMES[plugin["precision"]]}[kind], rank] for kind, rank in OUTPUTS[plugin["op"]]]
        assert plugin["outputs"] == expected
        assert plugin["created"] == [kind for kind, _ in expected]


def test_each_precision_that_was_compiled_for_the_widths_is_offered_as_one_combination_of_types(registered: list[dict[str, Any]]) -> None:
    for plugin in registered:
        alone = plugin["op"] in SELECTIONS or plugin["widths"] == {"F": 1}  # sizes are merged in float32 only
        assert len({tuple(types) for types in plugin["types"]}) == len(plugin["types"]) == (1 if alone else len(PRECISIONS))
        chosen = [types for types in plugin["types"] if NAMES[plugin["precision"]] in types]
        assert chosen or plugin["op"] in SELECTIONS


def test_the_engine_gets_the_compiled_kernel(registered: list[dict[str, Any]]) -> None:
    for plugin in registered:
        assert plugin["same_code"] or plugin["op"] in SELECTIONS
        assert plugin["kernel"].endswith("_kernel")


def test_a_target_without_kernels_is_refused(compiled: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", type(sys)("tensorrt"))
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", type(sys)("tensorrt.plugin"))
    monkeypatch.setattr(sys.modules["tensorrt"], "plugin", sys.modules["tensorrt.plugin"], raising=False)
    with pytest.raises(ContractError, match=r"no kernels for 7\.5"):
        register_plugins(compiled["fp16"], "7.5")


def test_graphs_give_registered_ops_to_their_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_plugins, "_compiled", {"KeepTop": []})
    nodes = [
        helper.make_node("KeepTop", ["key", "survivors"], ["index"], domain="vflow"),
        helper.make_node("RowLogSumExp", ["query", "key"], ["lse"], domain="vflow", scale=0.5),
    ]
    functions = [compaction.KEEP_TOP, importance.ROW_LOG_SUM_EXP]
    outputs = [helper.make_tensor_value_info("index", TensorProto.INT64, ["M"])]
    model = helper.make_model(helper.make_graph(nodes, "g", [], outputs), functions=functions)
    before = model.SerializeToString()
    changed = with_plugins(model)
    assert model.SerializeToString() == before
    assert [function.name for function in changed.functions] == ["RowLogSumExp"]
    by_op = {node.op_type: {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in changed.graph.node}
    assert by_op == {"KeepTop": {"plugin_namespace": b"vflow", "plugin_version": b"1"}, "RowLogSumExp": {"scale": 0.5}}
