"""Labelled and unlabelled questions about images: a JSONL file, a folder, or the generated scenes of the small model.

JSONL holds one ``{"image": "relative/path.png", "prompt": "…", "answer": "…", "kind": "…"}`` a line (``images`` for several, ``file_name`` for
``image``, ``kind`` optional). A folder holds

- ``metadata.jsonl``, such lines (the layout that Hugging Face calls imagefolder), or else
- pictures and for each a text file with its prompt, ``scene.png`` and ``scene.txt``: unlabelled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines.session import ImageSource
from .tiny.scenes import samples

__all__ = ["CALIBRATION_SEED", "EVALUATION_SEED", "CalibrationSample", "DataError", "LabelledSample", "generated_samples", "read_samples"]

EVALUATION_SEED = 9_000_000  # held out; other seeds serve training, its reports, `verify` and calibration
CALIBRATION_SEED = 6_000_000  # of what `tune` looks at, which evaluation must not
METADATA_FILE = "metadata.jsonl"
IMAGE_KEYS = ("image", "images", "file_name")  # a line names its images by one of these
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class DataError(ValueError):
    """A data file that cannot be used; the message names file and line."""


@dataclass(frozen=True)
class CalibrationSample:
    """A prompt and the images that it is about; no label."""

    images: tuple[ImageSource, ...]
    prompt: str


@dataclass(frozen=True)
class LabelledSample(CalibrationSample):
    """A question about images with its right answer, empty where it has none."""

    answer: str
    kind: str


def read_samples(path: Path, *, labelled: bool = True, images_required: bool = False) -> list[LabelledSample]:
    """Read a JSONL file or a folder (see above); every image file is looked for, none is opened.

    Args:
        labelled: whether every sample must have an answer; where not, a missing one (or null) is empty.
        images_required: whether every sample must have an image.

    Raises:
        DataError: nothing to read, or a line, picture or prompt that is not as it should be; the message names it and says what to change.
    """
    if not path.is_dir():
        return _read_jsonl(path, labelled, images_required)
    if (path / METADATA_FILE).exists():
        return _read_jsonl(path / METADATA_FILE, labelled, images_required)
    return _read_pictures(path, labelled)


def generated_samples(count: int, kinds: Sequence[str], side: int, *, seed: int = EVALUATION_SEED) -> Iterator[LabelledSample]:
    """Held-out scenes of ``side`` × ``side`` pixels, kinds in turn."""
    for sample in samples(seed=seed, count=count, kinds=kinds, width=side, height=side):
        yield LabelledSample((sample.image,), sample.question.prompt, sample.question.answer, sample.question.kind)


def _read_jsonl(path: Path, labelled: bool, images_required: bool) -> list[LabelledSample]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would end one at U+2028 too, which JSON allows in a string
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    found = [_sample(path, number, line, labelled, images_required) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{path}: no samples")
    return found


def _sample(path: Path, number: int, line: str, labelled: bool, images_required: bool) -> LabelledSample:
    where = f"{path}, line {number}"
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: must be a JSON object")
    if not labelled and values.get("answer") is None:
        values["answer"] = ""
    for key in ("prompt", "answer"):
        if not isinstance(values.get(key), str):
            raise DataError(f"{where}: {key!r} must be a string")
    images = tuple(path.parent / name for name in _image_names(values, where))
    missing = [image for image in images if not image.is_file()]
    if missing:
        raise DataError(f"{where}: no image file {missing[0]}; names are relative to {path.parent}")
    if images_required and not images:
        raise DataError(f"{where}: no image, and this needs one; name it in 'image' (or 'file_name')")
    return LabelledSample(images, values["prompt"], values["answer"], str(values.get("kind") or "all"))


def _image_names(values: dict[str, Any], where: str) -> list[str]:
    given = [key for key in IMAGE_KEYS if key in values]
    if not given:
        return []
    if len(given) > 1:
        raise DataError(f"{where}: {' and '.join(map(repr, given))} both name images; keep one of them")
    names = values[given[0]] if given[0] == "images" else [values[given[0]]]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: {given[0]!r} must be {'a list of paths' if given[0] == 'images' else 'a path'}")
    return names


def _read_pictures(folder: Path, labelled: bool) -> list[LabelledSample]:
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.is_file() and not path.name.startswith("."))
    if not pictures:
        raise DataError(f"{folder}: neither {METADATA_FILE} nor pictures ({', '.join(PICTURES)}) in this folder")
    if labelled:
        example = json.dumps({"file_name": pictures[0].name, "prompt": "…", "answer": "…"}, ensure_ascii=False)
        raise DataError(f"{folder}: pictures beside their prompts have no answers; write {folder / METADATA_FILE} with a line each: {example}")
    return [LabelledSample((picture,), _prompt_of(picture), "", "all") for picture in pictures]


def _prompt_of(picture: Path) -> str:
    file = picture.with_suffix(".txt")
    try:
        prompt = file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise DataError(f"{picture}: has no prompt; write it to {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from None
    if not prompt:
        raise DataError(f"{file}: empty; write the prompt for {picture.name} there")
    return prompt
