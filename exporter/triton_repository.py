"""A model repository for Triton Inference Server (not the Triton language): ``config.pbtxt`` and the few lines that load the engine.

Nothing of the engine is copied. The configuration is a ``ModelConfig`` protobuf, so what Triton would not know cannot be written.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ..engines.errors import EngineError
from ..engines.triton_server.interface import INPUTS, OUTPUTS, TensorSpec
from ..engines.triton_server.settings import Settings

__all__ = ["ENGINE_FROM_MODEL", "REPOSITORY_FOLDER", "model_config", "repository_name", "write_model"]

REPOSITORY_FOLDER = "triton"  # in an engine directory
ENGINE_FROM_MODEL = "../.."  # from triton/<name> in an engine directory to the engine, wherever that is moved or mounted
HEADER = "# A model of Triton Inference Server's Python backend, written by vflow-export; docs/triton.md says what parameters and tensors do.\n"
MODEL = '''"""Loaded by Triton Inference Server's Python backend, whose Python needs vflow-export (pip install vflow-export)."""

from vflow.engines.triton_server.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def repository_name(model: str) -> str:
    """A name for Triton, which makes folders and URLs of it: the last part of a model's name, and of that what is safe there."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip(".-")
    return name or "vflow"


def write_model(repository: Path, name: str, settings: Settings, *, stream: bool = True) -> Path:
    """Write one model, version 1, into a repository; returns the model's folder.

    Args:
        stream: answers come piece by piece (a decoupled model: gRPC streams, HTTP's generate and generate_stream). False makes a model that gives
            each answer whole, which is what plain ``infer`` calls need.

    Raises:
        EngineError: the name cannot be a folder, something is there already, or tritonclient is missing.
    """
    if name != repository_name(name):
        raise EngineError(f"{name!r} cannot be the name of a Triton model; use letters, digits, '.', '_' and '-'")
    text = model_config(name, settings, stream=stream)
    folder = repository / name
    if folder.exists():
        raise EngineError(f"{folder}: exists already; choose another folder or --name")
    try:
        (folder / "1").mkdir(parents=True)
        (folder / "1" / "model.py").write_text(MODEL, encoding="utf-8")
        (folder / "config.pbtxt").write_text(text, encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def model_config(name: str, settings: Settings, *, stream: bool = True) -> str:
    """``config.pbtxt`` as text.

    Raises:
        EngineError: tritonclient is missing.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ImportError:
        raise EngineError("tritonclient is missing, which knows Triton's configuration; pip install 'tritonclient[grpc]'") from None
    config = ModelConfig(name=name, backend="python", max_batch_size=0)  # requests differ in shape; the batch is made inside
    config.model_transaction_policy.decoupled = stream
    for spec in INPUTS:
        config.input.add(name=spec.name, data_type=_data_type(spec), dims=spec.shape, optional=True)
    for spec in OUTPUTS:
        config.output.add(name=spec.name, data_type=_data_type(spec), dims=spec.shape)
    # One: another instance would be another process with an engine and KV caches of its own. KIND_CPU says only that Triton places nothing.
    config.instance_group.add(count=1, kind="KIND_CPU")
    for key, value in settings.to_parameters().items():
        config.parameters[key].string_value = value
    text: str = HEADER + text_format.MessageToString(config)
    return text


def _data_type(spec: TensorSpec) -> str:
    return f"TYPE_{spec.dtype}"
