"""Where weights come from: an alias, a folder or a hub id, always safetensors, streamed one tensor at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .weight_files import CheckpointError, fingerprint, weight_files

if TYPE_CHECKING:
    import torch

    from .models import ModelConfig

__all__ = ["ALIASES", "Checkpoint", "CheckpointError", "TensorReader", "open_checkpoint", "resolve_model"]

TINY = Path(__file__).parent / "tiny"
ALIASES: dict[str, str] = {
    "tiny": str(TINY / "checkpoint"),
    "tiny-2.5": str(TINY / "checkpoint-2.5"),
    "tiny-3": str(TINY / "checkpoint-3"),
    "qwen2-vl": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2-vl-72b": "Qwen/Qwen2-VL-72B-Instruct",
    "qwen2.5-vl": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen2.5-vl-32b": "Qwen/Qwen2.5-VL-32B-Instruct",
    "qwen2.5-vl-72b": "Qwen/Qwen2.5-VL-72B-Instruct",
    "qwen3-vl": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
    "qwen3-vl-32b": "Qwen/Qwen3-VL-32B-Instruct",
}
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.json"]
BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def resolve_model(model: str) -> Path:
    """Folder of a model: an alias, a path, or a hub id that is in the local cache or can be fetched.

    Raises:
        CheckpointError: unknown, or neither cached nor reachable.
    """
    target = ALIASES.get(model, model)
    folder = Path(target)
    if folder.exists():
        if not folder.is_dir():
            raise CheckpointError(f"{model}: is a file; give the folder that holds config.json and *.safetensors")
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", target) or target.endswith("/"):
        raise CheckpointError(f"{model}: no such folder, and not a hub id (owner/name) or an alias ({', '.join(ALIASES)})")
    return _from_hub(model, target)


def _from_hub(model: str, repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES, local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError):
        pass
    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError:
        raise CheckpointError(f"{model}: the hub has no model {repository} (or it needs a login: hf auth login)") from None
    except (HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        raise CheckpointError(
            f"{model}: {repository} is not in the local cache and the hub cannot be reached; "
            "connect, or download it elsewhere and give its folder as --model"
        ) from None


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: file, dtype as safetensors spells it, shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint folder.

    Attributes:
        name: by which :func:`open_checkpoint` finds it again, from any working directory.
        tensors: by canonical name (``visual.…``, ``language_model.…``, ``lm_head.weight``).
    """

    name: str
    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    disk_names: Mapping[str, str]

    @cached_property
    def fingerprint(self) -> str:
        """As :func:`fingerprint`, read once."""
        return fingerprint(self.path)

    @property
    def size(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(_count(info.shape) * BYTES_OF[info.dtype] for info in self.tensors.values())


class TensorReader:
    """Reads tensors one at a time; a context manager that keeps the files open."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._stack, self._open = checkpoint, ExitStack(), dict[Path, Any]()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as stored.

        Raises:
            CheckpointError: tensors that overlap or leave gaps, or a file that has changed since it was checked.
        """
        from safetensors import SafetensorError, safe_open

        file = self._checkpoint.tensors[name].file
        if file not in self._open:
            try:
                self._open[file] = self._stack.enter_context(safe_open(file, "pt"))
            except SafetensorError as error:
                raise CheckpointError(f"{file}: damaged safetensors ({_first_line(error)}); download it again") from None
        tensor: torch.Tensor = self._open[file].get_tensor(self._checkpoint.disk_names[name])
        return tensor


def open_checkpoint(model: str) -> Checkpoint:
    """Find and check a model: its config, and that its weights are whole safetensors.

    Raises:
        CheckpointError: unknown model or family, missing or damaged files, pickled weights.
    """
    path = resolve_model(model)
    config = _read_config(path)
    files = weight_files(path)
    tensors: dict[str, TensorInfo] = {}
    disk_names: dict[str, str] = {}
    for file in files:
        for disk_name, dtype, shape in _read_header(file):
            name = _canonical(disk_name)
            if name in tensors:
                raise CheckpointError(f"{disk_name} is in {tensors[name].file} and in {file}: remove the one that does not belong to this checkpoint")
            tensors[name] = TensorInfo(file, dtype, shape)
            disk_names[name] = disk_name
    for field, count in (
        ("text_config.num_hidden_layers", config.text_config.num_hidden_layers),
        ("vision_config.depth", config.vision_config.depth),
    ):
        if count > len(tensors):  # before that many modules are made to find out what is missing
            raise CheckpointError(f"{path / 'config.json'}: {field} is {count}, the weights have {len(tensors)} tensors")
    lasting = os.path.abspath(path) if model not in ALIASES and Path(model).is_dir() else model  # found again from another working directory
    return Checkpoint(lasting, path, config, tensors, disk_names)


def _read_config(path: Path) -> ModelConfig:
    file = path / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; give the folder of a Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from None
    from huggingface_hub.errors import StrictDataclassError

    from .models import FAMILIES

    name = values.get("model_type") if isinstance(values, dict) else None
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise CheckpointError(f"{file}: model_type {name!r} is not supported (supported: {', '.join(FAMILIES)})")
    try:
        config: ModelConfig = family.config.from_dict(values)
    except (TypeError, ValueError, LookupError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{file}: not a valid {family.title} configuration ({_first_line(error)})") from None
    problem = family.check(config)
    if problem:
        raise CheckpointError(f"{file}: {problem}")
    return config


def _read_header(file: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor, after checking that the file is as long as its header says."""
    damaged = f"{file}: damaged or truncated safetensors; download it again"
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            size = file.stat().st_size
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise CheckpointError(damaged)
            header = json.loads(handle.read(length))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        if max((entry["data_offsets"][1] for _, entry in entries), default=0) != size - 8 - length:
            raise CheckpointError(damaged)
        for name, entry in entries:
            shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
            if not whole or entry["dtype"] not in BYTES_OF or end - start != _count(shape) * BYTES_OF[entry["dtype"]]:
                raise CheckpointError(f"{file}: tensor {name} of dtype {entry['dtype']} is damaged or not supported")
            yield name, entry["dtype"], shape
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(damaged) from None


def _canonical(name: str) -> str:
    """One spelling for the names that transformers 4 and 5 write."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    if name.startswith("model.language_model."):
        return name.removeprefix("model.")
    if name.startswith("model."):
        return "language_model." + name.removeprefix("model.")
    return name


def _count(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
