"""The weights files of a checkpoint folder, and the fingerprint that is made of them. Needs no framework."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

__all__ = ["CheckpointError", "fingerprint", "weight_files"]

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK = 16, 65_536  # of each weights file: enough to tell fine-tunes apart, quick at any size


class CheckpointError(ValueError):
    """A model that cannot be used; the message names the model or file and what to do."""


def fingerprint(path: Path) -> str:
    """Sixteen hex digits that tell models apart: the configuration, and size, tensor table and samples of the data of every weights file.

    Raises:
        CheckpointError: no configuration or no weights; see :func:`weight_files`.
    """
    config = path / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{config}: missing; give the folder of a Hugging Face checkpoint")
    digest = hashlib.sha256(config.read_bytes())
    for file in sorted(weight_files(path)):
        size = file.stat().st_size
        digest.update(f"{size}".encode())
        with file.open("rb") as handle:
            for block in range(FINGERPRINT_BLOCKS):
                handle.seek(block * max(0, size - FINGERPRINT_BLOCK) // (FINGERPRINT_BLOCKS - 1))
                digest.update(handle.read(FINGERPRINT_BLOCK))
    return digest.hexdigest()[:16]


def weight_files(path: Path) -> list[Path]:
    """Safetensors files of a checkpoint folder: those of its index, or all.

    Raises:
        CheckpointError: a damaged index, files that are missing, none at all, or pickled weights alone.
    """
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [path / name for name in names]
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
            raise CheckpointError(f"{index}: not a safetensors index; download it again") from None
        if any(file.parent != path for file in files):
            raise CheckpointError(f"{index}: names a file outside the folder; download it again")
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{path}: {missing[0]} is missing ({len(missing)} of {len(files)} weights files); download the rest")
        return files
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
    if pickled:
        raise CheckpointError(f"{path / pickled[0]}: pickled weights can run code when loaded and are refused; convert them to safetensors")
    raise CheckpointError(f"{path}: no *.safetensors weights")
