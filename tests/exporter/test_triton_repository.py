"""The Triton server model that every engine has: what Triton reads, and what the engine directory vouches for."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from support import DECODER_STAGES
from tritonclient.grpc.model_config_pb2 import ModelConfig
from vflow.engines import Engine, EngineError, open_engine, write_engine_directory
from vflow.engines.results import slot_bytes
from vflow.engines.triton_server.interface import INPUTS, OUTPUTS
from vflow.engines.triton_server.settings import Settings
from vflow.exporter.cli import main
from vflow.exporter.triton_repository import model_config, repository_name, write_model


@pytest.fixture(scope="module")
def engine(build: Callable[..., Engine], random_checkpoint: Path) -> Engine:
    return build(random_checkpoint, DECODER_STAGES)


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
