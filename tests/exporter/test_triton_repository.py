"""The Triton server model that every engine has: what Triton reads, and what the engine directory vouches for."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from support import DECODER_STAGES
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup
from vflow.engines import Engine, EngineError, open_engine, write_engine_directory
from vflow.engines.graphs import Graph
from vflow.engines.manifest import Limits
from vflow.engines.results import slot_bytes
from vflow.engines.triton_server.interface import INPUTS, OUTPUTS
from vflow.engines.triton_server.settings import Settings
from vflow.exporter import build as build_module
from vflow.exporter.build import BuildOptions, build_engine
from vflow.exporter.checkpoint import open_checkpoint
from vflow.exporter.cli import main
from vflow.exporter.tensorrt.graph import engine_interface
from vflow.exporter.tensorrt.profiles import vision_profiles
from vflow.exporter.triton_repository import model_config, repository_name, vision_config, write_model, write_vision_model


@pytest.fixture(scope="module")
def engine(build: Callable[..., Engine], random_checkpoint: Path) -> Engine:
    return build(random_checkpoint, DECODER_STAGES)


@pytest.fixture(scope="module")
def tensorrt_engine(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """What ``build --target tensorrt`` writes, with stand-ins for what needs a GPU: kernels and the builder."""

    def build_target(target: str, folder: Path, graphs: dict[str, Graph], segments: Any, limits: Limits, **options: Any) -> dict[str, Any]:
        (folder / target).mkdir()
        entry: dict[str, Any] = {"versions": {"tensorrt": "10.13"}, "compute_capabilities": ["8.9"]}
        for name, graph in graphs.items():
            files = {"file": f"{target}/{name}.engine", "log": f"{target}/{name}.log", "layers": f"{target}/{name}.layers.json"}
            for file in files.values():
                (folder / file).write_text(f"stand-in for {file}")
            inputs, outputs = engine_interface(graph, segments)
            interface = {"inputs": [asdict(tensor) for tensor in inputs], "outputs": [asdict(tensor) for tensor in outputs]}
            profiles = [asdict(profile) for profile in vision_profiles(limits)] if name == "vision" else []
            entry[name] = {**files, **interface, "profiles": profiles, "engine_bytes": 1, "build_seconds": 1.0, "peak_memory_bytes": None}
        return entry

    options = BuildOptions("fp16", max_visual_tokens=640, max_text_tokens=64, targets=("tensorrt",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "check_targets", lambda *_: None)
        patch.setattr(build_module, "check_target", lambda *_: None)
        patch.setattr(build_module, "gpu_capability", lambda: 8.9)
        patch.setattr(build_module, "compile_plugins", lambda *_, **__: None)
        patch.setattr(build_module, "build_target", build_target)
        return build_engine(open_checkpoint(str(random_checkpoint)), DECODER_STAGES, tmp_path_factory.mktemp("tensorrt") / "engine", options)


def read(file: Path) -> Any:
    return text_format.Parse(file.read_text(), ModelConfig())


def settings_of(config: Any) -> Settings:
    return Settings.from_config({"parameters": {key: {"string_value": value.string_value} for key, value in config.parameters.items()}})


def test_build_leaves_a_model_that_the_manifest_vouches_for(engine: Engine) -> None:
    files = [name for name in engine.files if name.startswith("triton/")]
    assert sorted(files) == ["triton/random/1/model.py", "triton/random/config.pbtxt"]
    assert sum(engine.files[name].size for name in files) < 8192  # nothing of the engine is copied
    (engine_file := engine.path / "triton" / "random" / "config.pbtxt").read_text()
    config = read(engine_file)
    assert settings_of(config).engine_path(engine_file.parent) == engine.path.resolve()
    ast.parse((engine.path / "triton" / "random" / "1" / "model.py").read_text())


def test_the_configuration_says_one_instance_streaming_and_every_tensor() -> None:
    config = text_format.Parse(model_config("m", Settings("e", slots=2)), ModelConfig())
    assert (config.name, config.backend, config.max_batch_size, config.model_transaction_policy.decoupled) == ("m", "python", 0, True)
    assert [group.count for group in config.instance_group] == [1]
    assert [tensor.name for tensor in config.input if tensor.optional] == [spec.name for spec in INPUTS]
    assert [tensor.name for tensor in config.output] == [spec.name for spec in OUTPUTS]
    assert settings_of(config) == Settings("e", slots=2)
    assert not text_format.Parse(model_config("m", Settings("e"), stream=False), ModelConfig()).model_transaction_policy.decoupled


@pytest.mark.parametrize(
    ("model", "name"),
    [("tiny", "tiny"), ("Qwen/Qwen2-VL-2B-Instruct", "Qwen2-VL-2B-Instruct"), ("/a b/c d!", "c-d"), ("..", "vflow"), ("/", "vflow"), ("ü", "vflow")],
)
def test_a_models_name_becomes_one_that_is_a_folder_and_a_url(model: str, name: str) -> None:
    assert repository_name(model) == name


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "../a"])
def test_names_that_leave_the_repository_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(EngineError, match="cannot be the name of a Triton model"):
        write_model(tmp_path / "repository", name, Settings("e"))
    assert not (tmp_path / "repository").exists()


def test_a_model_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        if path.name == "config.pbtxt":
            raise OSError(28, "No space left on device")
        return write_text(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_model(tmp_path, "m", Settings("e"))
    assert list(tmp_path.iterdir()) == []


def test_bytecode_beside_the_model_is_no_reason_to_keep_an_old_engine(engine: Engine, tmp_path: Path) -> None:
    target = tmp_path / "engine"
    manifest = json.loads((engine.path / "manifest.json").read_text())
    del manifest["files"]

    def write() -> None:
        with write_engine_directory(target, manifest, force=True) as folder:
            for name in engine.files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes((engine.path / name).read_bytes())

    write()
    (target / "triton" / "random" / "1" / "__pycache__").mkdir()
    (target / "triton" / "random" / "1" / "__pycache__" / "model.cpython-312.pyc").write_bytes(b"x")
    open_engine(target)
    write()
    assert not (target / "triton" / "random" / "1" / "__pycache__").exists()


def test_the_command_writes_a_model_with_other_parameters(engine: Engine, tmp_path: Path) -> None:
    options = [
        "--output",
        str(tmp_path / "repository"),
        "--kv-memory",
        "1MiB",
        "--queue-limit",
        "3",
        "--provider",
        "cpu",
        "--threads",
        "2",
        "--whole",
    ]
    result = CliRunner().invoke(main, ["triton-repository", str(engine.path), *options])
    assert result.exit_code == 0, result.output
    config = read(tmp_path / "repository" / "random" / "config.pbtxt")
    assert settings_of(config) == Settings(str(engine.path.resolve()), None, 2**20, 3, "cpu", 2)
    assert not config.model_transaction_policy.decoupled
    again = CliRunner().invoke(main, ["triton-repository", str(engine.path), *options])
    assert again.exit_code == 1 and "exists already" in again.stderr
    other = CliRunner().invoke(main, ["triton-repository", str(engine.path), *options, "--name", "other", "--engine-path", "/engine"])
    assert other.exit_code == 0 and settings_of(read(tmp_path / "repository" / "other" / "config.pbtxt")).engine == "/engine"


# ------------------------------------------------------------------------------------------------- the vision engine alone


def test_the_vision_engine_is_a_model_of_its_own_with_the_manifests_tensors(tensorrt_engine: Engine) -> None:
    vision = tensorrt_engine.targets["tensorrt"].vision
    config = read(tensorrt_engine.path / "triton" / "random-vision" / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size, config.default_model_filename) == ("random-vision", "tensorrt", 0, "model.plan")
    types = {"float16": "TYPE_FP16", "float": "TYPE_FP32", "int32": "TYPE_INT32", "int64": "TYPE_INT64"}
    for written, tensors in ((config.input, vision.inputs), (config.output, vision.outputs)):
        assert [(tensor.name, DataType.Name(tensor.data_type), list(tensor.dims)) for tensor in written] == [
            (tensor.name, types[tensor.dtype], [-1 if isinstance(size, str) else size for size in tensor.shape]) for tensor in tensors
        ]
    shown = {tensor.name: (DataType.Name(tensor.data_type), list(tensor.dims)) for tensor in (*config.input, *config.output)}
    assert shown["pixel_values"] == ("TYPE_FP16", [-1, -1, 4, 96]) and shown["index"] == ("TYPE_INT64", [-1])  # not only what the code says as well
    assert [(group.count, group.kind, list(group.profile)) for group in config.instance_group] == [(1, 1, ["0", "1", "2"])]
    assert len(vision.profiles) == 3 and ModelInstanceGroup.Kind.Name(1) == "KIND_GPU"
    assert read(tensorrt_engine.path / "triton" / "random" / "config.pbtxt").backend == "python"


def test_an_engine_with_one_profile_names_none_and_an_unknown_type_is_refused(tensorrt_engine: Engine) -> None:
    vision = tensorrt_engine.targets["tensorrt"].vision
    (group,) = text_format.Parse(vision_config("v", replace(vision, profiles=vision.profiles[:1])), ModelConfig()).instance_group
    assert list(group.profile) == []
    odd = replace(vision, inputs=(replace(vision.inputs[0], dtype="float8e4m3fn"), *vision.inputs[1:]))
    with pytest.raises(EngineError, match="Triton has no type for pixel_values, which is float8e4m3fn"):
        vision_config("v", odd)


def test_the_plan_is_a_link_that_the_manifest_vouches_for_wherever_the_engine_is_moved(tensorrt_engine: Engine, tmp_path: Path) -> None:
    name = "triton/random-vision/1/model.plan"
    moved = tmp_path / "moved"
    shutil.copytree(tensorrt_engine.path, moved, symlinks=True)
    assert open_engine(moved).files[name] == tensorrt_engine.files["tensorrt/vision.engine"]
    assert (moved / name).readlink() == Path("../../../tensorrt/vision.engine")
    assert (moved / name).resolve() == (moved / "tensorrt" / "vision.engine").resolve()
    (moved / name).unlink()
    with pytest.raises(EngineError, match=r"model\.plan: missing"):
        open_engine(moved)
    outside = tmp_path / "vision.engine"
    outside.write_bytes((moved / "tensorrt" / "vision.engine").read_bytes())
    (moved / name).symlink_to(outside)
    with pytest.raises(EngineError, match="leads outside"):
        open_engine(moved)


def test_where_no_link_can_be_made_the_plan_is_a_copy(tensorrt_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refused)
    vision = tensorrt_engine.targets["tensorrt"].vision
    plan = write_vision_model(tmp_path, "m", str(tensorrt_engine.path.resolve()), vision) / "1" / "model.plan"
    assert not plan.is_symlink() and plan.read_bytes() == (tensorrt_engine.path / vision.file).read_bytes()
    with pytest.raises(OSError, match="No such file"):
        write_vision_model(tmp_path, "n", "/nowhere", vision)
    assert [path.name for path in tmp_path.iterdir()] == ["m-vision"]


def test_the_command_writes_the_vision_engine_as_well(tensorrt_engine: Engine, engine: Engine, tmp_path: Path) -> None:
    def write(engine: Engine, *options: str) -> Any:
        return CliRunner().invoke(main, ["triton-repository", str(engine.path), "--output", str(tmp_path / "r"), *options])

    assert write(tensorrt_engine).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["random", "random-vision"]
    plan = tmp_path / "r" / "random-vision" / "1" / "model.plan"
    assert plan.readlink() == tensorrt_engine.path.resolve() / "tensorrt" / "vision.engine" and plan.read_bytes()
    assert read(tmp_path / "r" / "random-vision" / "config.pbtxt").input[0].name == "pixel_values"
    there = write(tensorrt_engine, "--name", "other", "--engine-path", "/engine")
    assert there.exit_code == 0 and "other-vision" in there.output
    assert (tmp_path / "r" / "other-vision" / "1" / "model.plan").readlink() == Path("/engine/tensorrt/vision.engine")
    (tmp_path / "r" / "third-vision").mkdir()
    taken = write(tensorrt_engine, "--name", "third")
    assert taken.exit_code == 1 and "third-vision: exists already" in taken.stderr and not (tmp_path / "r" / "third").exists()
    assert write(engine, "--name", "plain").exit_code == 0 and not (tmp_path / "r" / "plain-vision").exists()


def test_the_command_refuses_what_would_not_start(engine: Engine, tmp_path: Path) -> None:
    for options, code, message in (
        (["--kv-memory", str(slot_bytes(engine) - 1)], 1, "holds no request"),
        (["--kv-memory", "much"], 1, "'much' is not a size"),
        (["--kv-memory", "1GiB", "--slots", "2"], 2, "give one of them"),
        (["--name", "a/b"], 1, "cannot be the name of a Triton model"),
    ):
        result = CliRunner().invoke(main, ["triton-repository", str(engine.path), "--output", str(tmp_path / "r"), *options])
        assert result.exit_code == code and message in result.stderr, result.output
    assert not (tmp_path / "r").exists()
