"""Messages over HTTP to the prompt and the pictures of a request. Pictures are looked at before they are decoded."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..data_url import DATA_URL, unpack_data_url
from ..errors import EngineError
from ..preprocess import WEB_FORMATS, ImageError
from .options import ServeOptions
from .remote import fetch_image
from .schema import ImagePart, Message

__all__ = ["read_messages"]


def read_messages(messages: Sequence[Message], options: ServeOptions) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Messages as a session takes them, and their pictures in order, not decoded yet.

    Raises:
        EngineError: a picture that is none, is fetched from where it may not be, or too many or too large ones.
    """
    texts: list[dict[str, Any]] = []
    urls: list[str] = []
    for message in messages:
        content: Any = message.content
        if not isinstance(content, str):
            urls += [part.image_url.url for part in content if isinstance(part, ImagePart)]
            content = [{"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text} for part in content]
        texts.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    if len(urls) > options.max_images:
        raise EngineError(f"{len(urls)} images, and this server takes {options.max_images} a request; send fewer")
    images, pixels = [], 0
    for number, url in enumerate(urls, 1):
        image = _open(_content(url, options, number), number)
        pixels += image.width * image.height
        if pixels > options.max_image_pixels:
            raise ImageError(f"images have more than {options.max_image_pixels:,} pixels together (image {number}: {image.width} x {image.height}); "
                             "scale them down first")  # fmt: skip
        images.append(image)
    return texts, images


def _content(url: str, options: ServeOptions, number: int) -> bytes:
    data = url.encode(errors="replace")
    if data.startswith(DATA_URL):
        return unpack_data_url(data, f"image {number}")
    return fetch_image(url, options.remote_hosts, most=options.max_body_bytes)


def _open(content: bytes, number: int) -> Image.Image:
    """Read the header."""
    try:
        return Image.open(io.BytesIO(content), formats=WEB_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"image {number}: too many pixels (a decompression bomb?); scale it down first") from None
    except Exception as error:  # whatever a damaged header makes Pillow's readers raise
        raise ImageError(f"image {number}: not an image of {', '.join(WEB_FORMATS)} ({type(error).__name__})") from None
