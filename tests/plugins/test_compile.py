"""All kernels × precisions × targets ahead of time: the PTX is what the contract says, and the contract is enough to launch it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from kernel_graph import TOWER_WIDTH, WIDTH, kernel_graph
from vflow.engines import open_engine
from vflow.plugins.compile import MANIFEST_FILE, TARGETS, CompileError, compile_plugins, entry_parameters, graph_kernels, read_contracts
from vflow.plugins.contract import PRECISIONS, Contract, ContractError, evaluate
from vflow.plugins.driver import DriverError, DriverKernel

OPS = {
    "RowLogSumExp", "MaskedColumnMean", "KeepTop", "KeepTopPerCell", "GroupTokens", "MergeTokens", "GatherTokens", "LastTokenLogSumExp",
    "LastTokenAttention",
}  # fmt: skip
SUFFIXES = {"9.0": "a", "10.0": "a", "12.0": "a"}  # code for one architecture only


def contracts(compiled: dict[str, Path], precision: str) -> list[tuple[Contract, str]]:
    return [(contract, (compiled[precision] / contract.ptx).read_text()) for contract in read_contracts(compiled[precision])]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_op_is_compiled_for_every_target(compiled: dict[str, Path], compiled_entropy: dict[str, Path], precision: str) -> None:
    found = {(contract.op, contract.target) for contract, _ in contracts(compiled, precision)}
    assert found == {(op, target) for op in OPS for target in TARGETS}
    assert {contract.target for contract in read_contracts(compiled_entropy[precision])} == set(TARGETS)
    files = {file.name for file in compiled[precision].iterdir()}
    listed = {name for contract, _ in contracts(compiled, precision) for name in (contract.ptx, contract.cubin)}
    assert files == listed | {MANIFEST_FILE}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_node_gets_a_kernel_of_its_own_types_and_widths(compiled: dict[str, Path], precision: str) -> None:
    merging = {(c.static["F"], c.precision) for c, _ in contracts(compiled, precision) if c.op == "MergeTokens"}
    assert merging == {(TOWER_WIDTH, precision), (WIDTH, precision), (1, "fp32")}


def without(graph: onnx.ModelProto, number: int, *, op: str) -> onnx.ModelProto:
    """The graph, in which input ``number`` of an op is not described."""
    name = next(node.input[number] for node in graph.graph.node if node.op_type == op)
    graph.graph.input.remove(next(value for value in graph.graph.input if value.name == name))
    return graph


def test_a_graph_that_does_not_tell_what_to_compile_is_refused() -> None:
    with pytest.raises(CompileError, match="MergeTokens: the graph does not tell F of"):
        graph_kernels([without(kernel_graph("fp16"), 0, op="MergeTokens")], "fp16")
    graph = kernel_graph("fp16")
    graph.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    graph.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    with pytest.raises(CompileError, match="RowLogSumExp: the graph does not tell dtype of"):
        graph_kernels([graph], "fp16")


def test_nodes_without_a_kernel_are_refused() -> None:
    graph = kernel_graph("fp16")
    graph.graph.node[0].input.append("segment")
    with pytest.raises(CompileError, match="RowLogSumExp: kernels are compiled for 2 inputs, a node has 3"):
        graph_kernels([graph], "fp16")
    graph.graph.node[0].op_type = "PatchEntropy"
    with pytest.raises(CompileError, match="PatchEntropy: there is no kernel for this op"):
        graph_kernels([graph], "fp16")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_entry_takes_inputs_then_sizes_then_outputs(compiled: dict[str, Path], precision: str) -> None:
    for contract, ptx in contracts(compiled, precision):
        name, parameters = entry_parameters(ptx)
        assert name == contract.kernel
        assert parameters == ["u64"] * len(contract.inputs) + ["u32"] * len(contract.sizes) + ["u64"] * len(contract.outputs)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ptx_is_for_the_target_and_holds_the_launch_size(compiled: dict[str, Path], precision: str) -> None:
    for contract, ptx in contracts(compiled, precision):
        assert f".target sm_{contract.target.replace('.', '')}{SUFFIXES.get(contract.target, '')}" in ptx
        version = TARGETS[contract.target]
        assert f".version {version // 10}.{version % 10}" in ptx
        reserved = re.search(r"\.reqntid (\d+)", ptx)
        assert reserved is not None
        assert contract.block == (int(reserved.group(1)), 1, 1)
        assert contract.shared_bytes <= 48 * 1024


@pytest.mark.parametrize("precision", PRECISIONS)
def test_elements_are_loaded_in_their_precision(compiled: dict[str, Path], precision: str) -> None:
    """Products of half-precision inputs run on tensor cores, those of float32 inputs in float32."""
    product = {"fp32": r"fma\.rn\.(ftz\.)?f32", "fp16": r"(mma|wgmma|tcgen05)\S*f16", "bf16": r"(mma|wgmma|tcgen05)\S*(bf16|f16)"}[precision]
    for contract, ptx in contracts(compiled, precision):
        if contract.op in ("RowLogSumExp", "MaskedColumnMean"):
            assert re.search(product, ptx), f"{contract.op} {contract.target}"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_files_name_no_path_of_this_machine(compiled: dict[str, Path], precision: str) -> None:
    for contract, ptx in contracts(compiled, precision):
        assert ".file" not in ptx
        assert "/" not in re.sub(r"//.*", "", ptx)
        cubin = (compiled[precision] / contract.cubin).read_bytes()
        assert cubin.startswith(b"\x7fELF")
        assert contract.kernel.encode() in cubin
        assert b"kernels.py" not in cubin


def test_contracts_survive_their_file(compiled: dict[str, Path]) -> None:
    for contract in read_contracts(compiled["fp16"]):
        assert Contract.from_dict(contract.to_dict()) == contract


def test_launch_follows_from_input_shapes(compiled: dict[str, Path]) -> None:
    by_op = {contract.op: contract for contract in read_contracts(compiled["fp16"])}
    scoring = by_op["MaskedColumnMean"].launch([(16, 130, 80), (16, 200, 80), (16, 130), (130,)])
    assert (scoring.grid, scoring.sizes, scoring.output_shapes) == ((2, 16, 1), (130, 200), ((16, 200),))
    gather = by_op["GatherTokens"].launch([(1, 50, 96), (1, 50, 8), (1, 50, 8), (50,), (7,)])
    assert (gather.grid, gather.sizes) == ((7, 1, 1), (50, 7))
    assert gather.output_shapes == ((1, 7, 96), (1, 7, 8), (1, 7, 8), (7,))


def test_a_contract_refuses_other_widths(compiled: dict[str, Path]) -> None:
    by_op = {contract.op: contract for contract in read_contracts(compiled["fp16"])}
    with pytest.raises(ContractError, match="compiled for D = 80, got 64"):
        by_op["RowLogSumExp"].launch([(1, 4, 64), (1, 4, 64)])


@pytest.mark.parametrize("expression", ["__import__('os')", "P / 2", "Q", "P ** 2", "1.5", "P +", "-P"])
def test_expressions_are_integer_arithmetic_only(expression: str) -> None:
    with pytest.raises(ContractError):
        evaluate(expression, {"P": 3})


def test_expressions_round_down() -> None:
    assert evaluate("(P + 63) // 64 * 2 - 1", {"P": 65}) == 3


@pytest.mark.parametrize(("precision", "targets", "message"), [("fp8", ["9.0"], "fp8"), ("fp16", ["7.5"], "7.5")])
def test_unknown_precision_or_target_is_named(tmp_path: Path, precision: str, targets: list[str], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        compile_plugins(tmp_path, [kernel._replace(precision=precision) for kernel in graph_kernels([kernel_graph("fp16")], "fp16")], targets)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"format": 9, "kernels": []}', '{"format": 1, "kernels": [{"op": "X"}]}'])
def test_a_folder_without_usable_contracts_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / MANIFEST_FILE).write_text(content)
    with pytest.raises(ContractError, match=MANIFEST_FILE):
        read_contracts(tmp_path)


@pytest.mark.parametrize(("options", "kernels"), [(["--preset", "tuned-tower", "--keep", "0.11"], 9), (["--keep", "1"], 0)])
def test_build_compiles_what_the_graphs_of_the_engine_call(
    tmp_path: Path, compiler_environment: dict[str, str], options: list[str], kernels: int
) -> None:
    """``build --compute-capability`` in a process of its own, with the compiler and not the interpreter."""
    command = [sys.executable, "-c", "from vflow.exporter.cli import main; main()", "build", "--model", "tiny", "--output", str(tmp_path / "engine")]
    command += [*options, "--precision", "fp16", "--compute-capability", "9.0", "--compute-capability", "8.7"]
    done = subprocess.run(command, env=compiler_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = read_contracts(tmp_path / "engine" / "plugins")
    graphs = [onnx.load(tmp_path / "engine" / f"{name}.onnx", load_external_data=False) for name in ("vision", "language")]
    called = [(spec.op, precision, {name: values[name] for name in spec.static}) for spec, values, precision in graph_kernels(graphs, "fp16")]
    assert [(c.op, c.precision, c.static) for c in found if c.target == "9.0"] == called
    assert [(c.op, c.precision, c.static) for c in found if c.target == "8.7"] == called
    assert len(called) == kernels
    assert open_engine(tmp_path / "engine").files.keys() >= {f"plugins/{contract.ptx}" for contract in found}


class FakeDriver:
    """Stands in for the CUDA driver: records the launch."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.launches, self.loaded = failing, [], b""

    def _result(self, name: str, *values: Any) -> tuple[Any, ...]:
        return (1 if name == self.failing else 0, *values)

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:  # noqa: N802
        self.loaded = image
        return self._result("load", "module")

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Any, ...]:  # noqa: N802
        return self._result("function", SimpleNamespace(module=module, name=name))

    def cuLaunchKernel(self, *arguments: Any) -> tuple[Any, ...]:  # noqa: N802
        self.launches.append(arguments)
        return self._result("launch")


def kernel_and_inputs(compiled: dict[str, Path], driver: FakeDriver, *, assembled: bool = False) -> tuple[DriverKernel, list[torch.Tensor]]:
    contract = next(c for c in read_contracts(compiled["fp16"]) if (c.op, c.target) == ("MaskedColumnMean", "9.0"))
    shapes = {"T": torch.float16, "float32": torch.float32, "bool": torch.bool}
    sizes = {"H": 2, "R": 3, "P": 70, "D": 80}
    inputs = [torch.zeros([sizes[n] for n in argument.shape], dtype=shapes[argument.dtype]) for argument in contract.inputs]
    return DriverKernel(contract, compiled["fp16"], assembled=assembled, driver=driver), inputs


@pytest.mark.parametrize("assembled", [False, True])
def test_the_driver_gets_what_the_contract_says(compiled: dict[str, Path], assembled: bool) -> None:
    driver = FakeDriver()
    kernel, inputs = kernel_and_inputs(compiled, driver, assembled=assembled)
    (output,) = kernel(*inputs, stream=7)
    assert driver.loaded.startswith(b"\x7fELF" if assembled else b"//")
    ((function, *launch, (values, types), extra),) = driver.launches
    assert function.name == b"masked_column_mean_kernel"
    assert launch == [1, 2, 1, *kernel.contract.block, kernel.contract.shared_bytes, 7]
    assert values == (*(x.data_ptr() for x in inputs), 3, 70, output.data_ptr())
    assert len(types) == len(values)
    assert extra == 0
    assert (output.shape, output.dtype) == ((2, 70), torch.float32)


@pytest.mark.parametrize("failing", ["load", "function", "launch"])
def test_errors_of_the_driver_are_raised(compiled: dict[str, Path], failing: str) -> None:
    def load_and_run() -> None:
        kernel, inputs = kernel_and_inputs(compiled, FakeDriver(failing))
        kernel(*inputs)

    with pytest.raises(DriverError, match="MaskedColumnMean"):
        load_and_run()


def test_the_launcher_refuses_strided_inputs(compiled: dict[str, Path]) -> None:
    kernel, inputs = kernel_and_inputs(compiled, FakeDriver())
    inputs[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ContractError, match=r"query must be torch\.float16, contiguous"):
        kernel(*inputs)
