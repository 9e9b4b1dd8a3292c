"""A model repository for Triton Inference Server (not the Triton language): ``config.pbtxt`` and the few lines that load the engine.

Nothing of the engine is copied. The configuration is a ``ModelConfig`` protobuf, so what Triton would not know cannot be written. Where there is a
TensorRT engine of the vision graph, a second model shows it alone in Triton's own TensorRT backend: it needs neither caches nor Python.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..engines.errors import EngineError
from ..engines.graphs import BuiltEngine
from ..engines.triton_server.interface import INPUTS, OUTPUTS, TensorSpec
from ..engines.triton_server.settings import Settings

__all__ = [
    "ENGINE_FROM_MODEL",
    "REPOSITORY_FOLDER",
    "VISION_SUFFIX",
    "VISION_TARGET",
    "model_config",
    "repository_name",
    "vision_config",
    "write_model",
    "write_vision_model",
]

REPOSITORY_FOLDER = "triton"  # in an engine directory
ENGINE_FROM_MODEL = "../.."  # from triton/<name> in an engine directory to the engine, wherever that is moved or mounted
VISION_SUFFIX = "-vision"  # of the model that is the vision engine alone
VISION_TARGET = "tensorrt"  # whose engines that backend loads; those of TensorRT for RTX it refuses
PLAN_FILE = "model.plan"
HEADER = "# A model of Triton Inference Server's Python backend, written by vflow-export; docs/triton.md says what parameters and tensors do.\n"
VISION_HEADER = "# The vision engine alone, for Triton Inference Server's TensorRT backend, written by vflow-export: docs/triton.md.\n"
TYPES = {
    "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "float": "TYPE_FP32", "float32": "TYPE_FP32", "int64": "TYPE_INT64", "int32": "TYPE_INT32",
}  # fmt: skip
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
    _check_name(name)
    config = model_config(name, settings, stream=stream)
    return _write(repository / name, config, lambda version: (version / "model.py").write_text(MODEL, encoding="utf-8"))


def write_vision_model(repository: Path, name: str, engine: str, vision: BuiltEngine) -> Path:
    """Write ``name``-vision, the vision engine alone for Triton's TensorRT backend, beside the model ``name``; returns its folder.

    Its plan is a symbolic link: weights are not there twice, and it may lead to where the engine will be on the server. A relative one stays right
    when the engine directory is moved, and leads nowhere outside it, which readers of the directory refuse. A copy where links cannot be made.

    Args:
        engine: the engine directory as in :class:`Settings`: from the model's folder, or absolute; vision: its engine for ``tensorrt``.

    Raises:
        EngineError: as :func:`write_model`, or a type that Triton does not have.
    """
    _check_name(name)
    name += VISION_SUFFIX
    return _write(repository / name, vision_config(name, vision), lambda version: _link(version / PLAN_FILE, Path("..", engine, vision.file)))


def _check_name(name: str) -> None:
    if name != repository_name(name):
        raise EngineError(f"{name!r} cannot be the name of a Triton model; use letters, digits, '.', '_' and '-'")


def _write(folder: Path, config: str, fill: Callable[[Path], object]) -> Path:
    """A model's folder, whole or not at all; ``fill`` writes into the one of version 1."""
    if folder.exists():
        raise EngineError(f"{folder}: exists already; choose another folder or --name")
    try:
        (folder / "1").mkdir(parents=True)
        fill(folder / "1")
        (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _link(link: Path, target: Path) -> None:
    """``target`` is absolute, or seen from the link's folder."""
    try:
        link.symlink_to(target)
    except OSError:  # Windows without the right to, or a file system that has none
        shutil.copyfile(link.parent / target, link)


def model_config(name: str, settings: Settings, *, stream: bool = True) -> str:
    """``config.pbtxt`` as text.

    Raises:
        EngineError: tritonclient is missing.
    """
    config = _new_config(name, "python")  # requests differ in shape; the batch is made inside
    config.model_transaction_policy.decoupled = stream
    for spec in INPUTS:
        config.input.add(name=spec.name, data_type=_data_type(spec), dims=spec.shape, optional=True)
    for spec in OUTPUTS:
        config.output.add(name=spec.name, data_type=_data_type(spec), dims=spec.shape)
    # One: another instance would be another process with an engine and KV caches of its own. KIND_CPU says only that Triton places nothing.
    config.instance_group.add(count=1, kind="KIND_CPU")
    for key, value in settings.to_parameters().items():
        config.parameters[key].string_value = value
    return _text(HEADER, config)


def vision_config(name: str, vision: BuiltEngine) -> str:
    """``config.pbtxt`` of a vision engine as text: the tensors of the manifest, a free dimension as −1, and every profile.

    Raises:
        EngineError: tritonclient is missing, or Triton has no such type.
    """
    config = _new_config(name, "tensorrt")  # one image a request: its tensors have no dimension for a batch
    config.default_model_filename = PLAN_FILE
    for side, tensors in ((config.input, vision.inputs), (config.output, vision.outputs)):
        for tensor in tensors:
            if tensor.dtype not in TYPES:
                raise EngineError(f"{vision.file}: Triton has no type for {tensor.name}, which is {tensor.dtype}")
            side.add(name=tensor.name, data_type=TYPES[tensor.dtype], dims=[size if isinstance(size, int) else -1 for size in tensor.shape])
    profiles = [str(number) for number in range(len(vision.profiles))] if len(vision.profiles) > 1 else []  # else the backend takes the first alone
    config.instance_group.add(count=1, kind="KIND_GPU", profile=profiles)
    return _text(VISION_HEADER, config)


def _new_config(name: str, backend: str) -> Any:
    try:
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ImportError:
        raise EngineError("tritonclient is missing, which knows Triton's configuration; pip install 'tritonclient[grpc]'") from None
    return ModelConfig(name=name, backend=backend, max_batch_size=0)


def _text(header: str, config: Any) -> str:
    from google.protobuf import text_format

    text: str = header + text_format.MessageToString(config)
    return text


def _data_type(spec: TensorSpec) -> str:
    return f"TYPE_{spec.dtype}"
