"""The engine directory: written whole or not at all, and checked before it is used.

A build fills a temporary sibling of the target; manifest.json comes last, and one rename puts the folder in its place. So a
folder with a manifest at the target is a finished engine.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import EngineError
from .fields import field
from .manifest import Engine, FileEntry, Segment, kv_segments, parse_manifest

__all__ = ["MANIFEST_FILE", "Engine", "EngineError", "Segment", "kv_segments", "open_engine", "write_engine_directory"]

MANIFEST_FILE = "manifest.json"
CHECKSUM = "checksum"  # field of the manifest: it lists the hashes of all files but its own
PARTIAL_MARK = ".partial-"  # in the name of a sibling that is being written
REPLACED_MARK = ".replaced-"  # in the name of an old engine while the new one takes its place
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
REBUILD = "build the engine again"


@contextmanager
def write_engine_directory(target: str | Path, manifest: dict[str, Any], *, force: bool = False) -> Iterator[Path]:
    """Write an engine directory atomically.

    Args:
        target: where the engine will be; parents are made.
        manifest: all of manifest.json but ``files``. It is read when the block ends, so the block may still fill it.
        force: replace an engine, or an empty folder, that is there already.

    Yields:
        An empty folder for the engine's files (subfolders are allowed).

    Raises:
        EngineError: the target exists (and is not ours to replace), the disk is full, or the manifest is not valid. Whatever is raised,
            KeyboardInterrupt included, the temporary folder is removed and an old engine stays.
    """
    target = Path(os.path.realpath(target))
    _check_replaceable(target, force)
    draft = target.with_name(f".{target.name}{PARTIAL_MARK}{secrets.token_hex(4)}")
    try:
        _make_folder(draft)
        yield draft
        _seal(draft, manifest)
        _put_in_place(draft, target, force)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise EngineError(f"{target}: no space left on the disk; free some or choose another folder") from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def open_engine(path: str | Path, *, check_hashes: bool = True) -> Engine:
    """Read and check an engine directory.

    Args:
        path: the folder.
        check_hashes: read every file and compare its SHA-256; sizes are compared in any case.

    Raises:
        EngineError: not a folder, no manifest, a manifest that cannot be used, or a file that is missing or differs from the one built.
            The message starts with the file and ends in what to do.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise EngineError(
            f"{folder}: {'is a file, not an engine directory' if folder.exists() else 'no such engine directory'}; give the folder that build wrote"
        )
    if PARTIAL_MARK in folder.resolve().name:
        raise EngineError(f"{folder}: left over by a build that was stopped; delete it and {REBUILD}")
    engine = parse_manifest_file(folder)
    for name, entry in engine.files.items():
        _check_file(folder, name, entry, check_hashes)
    return engine


def parse_manifest_file(folder: Path) -> Engine:
    """Read ``folder``/manifest.json without looking at the other files.

    Raises:
        EngineError: as :func:`open_engine`.
    """
    manifest = folder / MANIFEST_FILE
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(f"{manifest}: missing, so this is not an engine directory; give the folder that build wrote") from None
    except OSError as error:
        raise EngineError(f"{manifest}: {error.strerror or error}; {REBUILD}") from None
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{manifest}: not JSON ({error}); {REBUILD}") from None
    try:
        engine = parse_manifest(values, folder)
        if field(values, CHECKSUM, str) != checksum(values):  # last: what is wrong with a field says more
            raise EngineError(f"damaged, its {CHECKSUM} is not that of its fields")
    except EngineError as error:
        raise EngineError(f"{manifest}: {error}; {REBUILD}") from None
    return engine


def checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's fields but its own, whatever their order and the space between them."""
    fields = {key: value for key, value in manifest.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in chunks."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(folder: Path, name: str, entry: FileEntry, check_hash: bool) -> None:
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise EngineError(f"{path}: a link that leads outside the engine's folder; copy the file there or {REBUILD}")
        if not path.is_file():
            raise EngineError(f"{path}: missing; {REBUILD}")
        size = path.stat().st_size
        if size != entry.size:
            raise EngineError(f"{path}: has {size} bytes, was built with {entry.size}; {REBUILD}")
        if check_hash and file_sha256(path) != entry.sha256:
            raise EngineError(f"{path}: damaged, its SHA-256 is not the one built; {REBUILD}")
    except OSError as error:
        raise EngineError(f"{path}: {error.strerror or error}; {REBUILD}") from None


def _check_replaceable(target: Path, force: bool) -> None:
    """Refuse a target that must not be replaced: force is for engines, never for other people's folders."""
    if not os.path.lexists(target):
        return
    if not force:
        raise EngineError(f"{target}: exists already; choose another folder or use --force")
    if not target.is_dir():
        raise EngineError(f"{target}: is not a folder; choose another one")
    names = _file_names(target, with_folders=True)
    if not names:
        return
    try:
        engine = parse_manifest_file(target)
    except EngineError:
        raise EngineError(
            f"{target}: is not an engine directory, so --force does not replace it; choose another folder or delete it yourself"
        ) from None
    own = {MANIFEST_FILE, *engine.files}
    own |= {parent.as_posix() for name in engine.files for parent in Path(name).parents}
    foreign = sorted(name for name in names - own if "__pycache__" not in Path(name).parts)  # Python's, beside the Triton server model
    if foreign:
        raise EngineError(f"{target}: holds {foreign[0]}, which is not of the engine, so --force does not replace it; move it away first")


def _file_names(folder: Path, *, with_folders: bool = False) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if with_folders or not path.is_dir()}


def _make_folder(draft: Path) -> None:
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise EngineError(f"{draft.parent}: cannot be written ({error.strerror}); choose another folder") from None


def _seal(draft: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a filled draft, checked as a reader will check it, and force everything to the disk."""
    names = sorted(_file_names(draft))
    files = {name: {"sha256": file_sha256(draft / name), "size": (draft / name).stat().st_size} for name in names}
    values = {**manifest, "files": files}
    text = json.dumps({**values, CHECKSUM: checksum(values)}, indent=2, allow_nan=False) + "\n"
    try:
        parse_manifest(json.loads(text), draft)
    except EngineError as error:
        raise EngineError(f"{MANIFEST_FILE} would not be valid: {error}") from None
    (draft / MANIFEST_FILE).write_text(text, encoding="utf-8")
    for path in sorted(draft.rglob("*")):
        _flush(path)
    _flush(draft)


def _put_in_place(draft: Path, target: Path, force: bool) -> None:
    _check_replaceable(target, force)  # again: a build takes long, and somebody may have put something there
    aside = target.with_name(f".{target.name}{REPLACED_MARK}{secrets.token_hex(4)}")
    try:
        if target.exists():
            os.rename(target, aside)
        os.rename(draft, target)
    except BaseException as error:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        if isinstance(error, OSError) and error.errno not in DISK_FULL:
            raise EngineError(f"{target}: the engine cannot be put there ({error.strerror}); choose another folder") from error
        raise
    _flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
