"""Methods that drop visual tokens, to be compared in one harness: controls first, then by the place at which they prune."""

from __future__ import annotations

from .attention import ATTENTION
from .base import Method
from .divprune import DIVPRUNE
from .downsample import DOWNSAMPLE
from .entropyprune import ENTROPYPRUNE
from .evoprune import EVOPRUNE
from .fastv import FASTV
from .lrcp import LRCP
from .lvtp import LVTP
from .pixelprune import PIXELPRUNE
from .pyramiddrop import PYRAMIDDROP
from .random_choice import RANDOM
from .uniform_grid import UNIFORM_GRID
from .vflowopt import VFLOWOPT_PUBLISHED
from .visionzip import VISIONZIP

__all__ = ["METHODS", "Method"]

CONTROLS = (RANDOM, UNIFORM_GRID, ATTENTION, DOWNSAMPLE)
BY_PLACE = (PIXELPRUNE, EVOPRUNE, VISIONZIP, DIVPRUNE, LRCP, LVTP, VFLOWOPT_PUBLISHED, FASTV, PYRAMIDDROP, ENTROPYPRUNE)
METHODS: dict[str, Method] = {method.name: method for method in (*CONTROLS, *BY_PLACE)}
