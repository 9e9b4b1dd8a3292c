"""What tests of several rooms need to know about the small checkpoints and engines of ``conftest.py``."""

from __future__ import annotations

import signal

import numpy as np
from numpy.typing import NDArray
from vflow.exporter.schedule import Schedule, Stage

PATCH_SIZE = 4  # so that a visual token is 8 pixels wide and images stay small
MAX_VISUAL_TOKENS, MAX_TEXT_TOKENS = 64, 64  # of the engines
HANDLED_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))  # by every command
DECODER_STAGES = Schedule((Stage("decoder", 0, 500), Stage("decoder", 2, 250)))


def picture(rows: int, columns: int, seed: int = 0) -> NDArray[np.uint8]:
    """Blocks of colour with grain of varying strength: uint8 [8 · rows, 8 · columns, 3], rows × columns visual tokens."""
    rng = np.random.default_rng(seed)
    side = 2 * PATCH_SIZE
    base = rng.integers(0, 256, (rows, columns, 3)).repeat(side, 0).repeat(side, 1)
    strength = rng.uniform(0, 60, (rows, columns, 1)).repeat(side, 0).repeat(side, 1)
    return np.clip(base + rng.normal(size=base.shape) * strength, 0, 255).astype(np.uint8)
