"""Pixels in, patches out: the Qwen2-VL image preprocessing in NumPy and Pillow, without transformers.

Sizes are pixels, images are ``uint8 [height, width, 3]``, patches are in the order in which the tower's merger joins them
(each run of ``merge_size**2`` rows is one visual token), as in Hugging Face's ``Qwen2VLImageProcessor``.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import EngineError

__all__ = [
    "ImageError",
    "ImagePatches",
    "ImageProcessorConfig",
    "load_image",
    "patch_entropy",
    "patchify",
    "preprocess_image",
    "smart_resize",
]

ENTROPY_BINS = 256
MAX_ASPECT_RATIO = 200  # Hugging Face refuses longer strips as well
WEB_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # of bytes that anybody may have sent; some of Pillow's other readers start programs
MAX_INPUT_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs (0.25 GiB of RGB)


class ImageError(EngineError):
    """An image that cannot be used; the message says which and what to change."""


@dataclass(frozen=True)
class ImageProcessorConfig:
    """How pixels become patches (``preprocessor_config.json`` of the checkpoint)."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def factor(self) -> int:
        """Side of one visual token in pixels; image sides are multiples of it."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageProcessorConfig:
        """Read a Hugging Face ``preprocessor_config.json`` (either spelling of the pixel limits) or a manifest entry."""
        size = values.get("size") or {}
        return cls(
            patch_size=int(values.get("patch_size", cls.patch_size)),
            temporal_patch_size=int(values.get("temporal_patch_size", cls.temporal_patch_size)),
            merge_size=int(values.get("merge_size", cls.merge_size)),
            min_pixels=int(values.get("min_pixels") or size.get("shortest_edge") or cls.min_pixels),
            max_pixels=int(values.get("max_pixels") or size.get("longest_edge") or cls.max_pixels),
            image_mean=tuple(float(v) for v in values.get("image_mean", cls.image_mean)),
            image_std=tuple(float(v) for v in values.get("image_std", cls.image_std)),
        )

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which an image is scaled, multiples of ``factor``; errors as :func:`smart_resize`."""
        return smart_resize(height, width, factor=self.factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels)


@dataclass(frozen=True)
class ImagePatches:
    """One preprocessed image.

    ``pixel_values`` float32 or float16 [P, 3 * temporal_patch_size * patch_size**2]; ``entropy`` float32 [P], bits, [0] where nobody asked for it;
    ``grid_thw`` = (1, patch rows, patch columns).
    """

    pixel_values: NDArray[np.floating[Any]]
    entropy: NDArray[np.float32]
    grid_thw: tuple[int, int, int]


def load_image(source: str | Path | bytes | Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Read an image as RGB ``uint8 [height, width, 3]``, turned upright by its EXIF orientation.

    ``bytes`` are the contents of a file of one of ``WEB_FORMATS``.

    Raises:
        ImageError: not there, not an image, truncated, or more than ``MAX_INPUT_PIXELS`` pixels.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8 or source.size == 0:
            raise ImageError(f"image array must be uint8 [height, width, 3] and not empty, got {source.dtype} {list(source.shape)}")
        if source.shape[0] * source.shape[1] > MAX_INPUT_PIXELS:
            raise ImageError(_too_large("image array"))
        return source
    name = "image" if isinstance(source, (Image.Image, bytes)) else str(source)
    try:
        image = source if isinstance(source, Image.Image) else _open(source)
        if image.width * image.height > MAX_INPUT_PIXELS:
            raise ImageError(_too_large(name))
        upright = ImageOps.exif_transpose(image)
        return np.asarray(_on_white(_of_8_bits(upright, image.format, name)).convert("RGB"))
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: is a folder, not an image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(_too_large(name)) from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image that Pillow can read (PNG, JPEG, WebP, ...)") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name}: damaged image ({error})") from None


def _open(source: str | Path | bytes) -> Image.Image:
    return Image.open(io.BytesIO(source), formats=WEB_FORMATS) if isinstance(source, bytes) else Image.open(source)


def _too_large(name: str) -> str:
    return f"{name}: larger than {MAX_INPUT_PIXELS:,} pixels (a decompression bomb?): scale it down first"


def _of_8_bits(image: Image.Image, file_format: str | None, name: str) -> Image.Image:
    """Grey of 16 bits scaled to 8. Pillow's own conversion clips: nearly all of it would be white.

    Raises:
        ImageError: numbers of 32 bits, of which nobody knows which are black and white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PNG"):  # which before Pillow 11 PNG's 16 bits were
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: holds one number of 32 bits a pixel (mode {image.mode}), without a scale: convert it to 8 bits first")
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Flatten transparency onto white, as browsers show it; without this, hidden pixels would show."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, rgba)
    return image


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Nearest size whose sides are multiples of ``factor`` and whose area is within the limits, aspect ratio kept.

    Same arithmetic as Hugging Face's ``smart_resize``, so that both sides see the same grid.

    Raises:
        ImageError: an aspect ratio above 200.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ImageError(f"image of {width}x{height}: aspect ratio must be at most {MAX_ASPECT_RATIO}: crop it first")
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        scale = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def patchify(image: NDArray[Any], *, patch_size: int, merge_size: int) -> NDArray[Any]:
    """Cut an image into patches in merge order.

    Args:
        image: ``[height, width, channels]``, sides multiples of ``patch_size * merge_size``.

    Returns:
        ``[P, channels, patch_size, patch_size]``: visual tokens row by row, the patches of one token next to each other.
    """
    height, width, channels = image.shape
    side = patch_size * merge_size
    grid = image.reshape(height // side, merge_size, patch_size, width // side, merge_size, patch_size, channels)  # [rows, m, ph, columns, m, pw, C]
    return grid.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels, patch_size, patch_size)


def patch_entropy(image: NDArray[np.uint8], *, patch_size: int, merge_size: int) -> NDArray[np.float32]:
    """Shannon entropy of each patch's grey levels (VFlowOpt section 3.2): 256 bins, in bits, in [0, 8].

    The grey level is the mean of R, G and B, rounded down. ``image`` is ``uint8 [height, width, 3]``; returns float32 [P] in merge order.
    """
    red, green, blue = (image[:, :, channel].astype(np.uint16) for channel in range(3))
    grey = ((red + green + blue) // 3)[:, :, None]  # [H, W, 1]
    patches = patchify(grey, patch_size=patch_size, merge_size=merge_size).reshape(-1, patch_size**2)
    count = patches.shape[0]
    offsets = np.arange(count, dtype=np.intp)[:, None] * ENTROPY_BINS
    histogram = np.bincount((patches + offsets).ravel(), minlength=count * ENTROPY_BINS)
    share = np.arange(patch_size**2 + 1) / float(patch_size**2)  # of every count that there can be
    terms = share * np.log2(share, out=np.zeros_like(share), where=share > 0)
    bits: NDArray[np.float32] = np.maximum(-terms[histogram].reshape(count, ENTROPY_BINS).sum(axis=1), 0.0).astype(np.float32)
    return bits


def preprocess_image(
    image: NDArray[np.uint8], config: ImageProcessorConfig, *, dtype: type[np.floating[Any]] = np.float32, entropy: bool = True
) -> ImagePatches:
    """Resize, measure entropy, normalise and cut one image into patches.

    Args:
        image: RGB ``uint8 [height, width, 3]``.
        dtype: of the pixel values; float16 ones are the float32 ones rounded, for less work.
        entropy: whether it is wanted.

    Raises:
        ImageError: an aspect ratio above 200.
    """
    height, width = image.shape[:2]
    new_height, new_width = config.resized(height, width)
    if (new_height, new_width) != (height, width):
        resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC)
        image = np.asarray(resized)
    cut = {"patch_size": config.patch_size, "merge_size": config.merge_size}
    bits = patch_entropy(image, **cut) if entropy else np.zeros(0, np.float32)
    patches = patchify(image, **cut)  # uint8 [P, 3, p, p]
    pixels = np.empty((patches.shape[0], patches.shape[1], config.temporal_patch_size, config.patch_size**2), dtype)
    levels = np.arange(256, dtype=np.float32) / 255.0
    for channel, (mean, std) in enumerate(zip(config.image_mean, config.image_std, strict=True)):
        normalised = ((levels - np.float32(mean)) / np.float32(std)).astype(dtype)
        pixels[:, channel] = normalised[patches[:, channel]].reshape(-1, 1, config.patch_size**2)  # a still image is two equal frames
    grid = (1, new_height // config.patch_size, new_width // config.patch_size)
    return ImagePatches(pixels.reshape(patches.shape[0], -1), bits, grid)
