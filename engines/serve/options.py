"""What a server allows, as data."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import EngineError

__all__ = ["ServeOptions"]


@dataclass(frozen=True)
class ServeOptions:
    """Limits of a server and who may use it.

    Attributes:
        model: name under which the engine is served; None takes the one in its manifest.
        api_key: that ``Authorization: Bearer`` must bear; None lets everybody in.
        max_body_bytes: of a request, pictures in it included.
        max_images: of a request.
        max_image_pixels: of all images of a request before they are scaled down, read off their headers before they are decoded.
        remote_hosts: from which ``https`` images are fetched; none are without.
        timeout: seconds from a request to the end of its answer.
    """

    model: str | None = None
    api_key: str | None = None
    max_body_bytes: int = 32 << 20
    max_images: int = 16
    max_image_pixels: int = 50_000_000
    remote_hosts: frozenset[str] = frozenset()
    timeout: float = 300.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_images", "max_image_pixels"):
            if getattr(self, name) < 1:
                raise EngineError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.timeout > 0:
            raise EngineError(f"timeout must be more than 0 seconds, got {self.timeout}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key.strip() == self.api_key != ""):
            raise EngineError("the API key must be printable ASCII without spaces around it, and not empty")
