"""What a pruning method is, so that all of them are compared in one harness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..budget import spend_keep
from ..models import LanguageGraph, VisionGraph
from ..schedule import Schedule, Stage
from ..shape import ModelShape

__all__ = ["Method", "single_stage"]


@dataclass(frozen=True)
class Method:
    """A way to drop visual tokens for a budget.

    A method is a schedule, and where the schedule alone does not say which tokens survive, graphs that choose in another way: they override
    ``rank_pixels``, ``score``, ``compact`` (``VisionGraph``) or ``rank`` (``LanguageGraph``).

    Attributes:
        name: as the command line and the tables have it.
        schedule: stages for an average keep over decoder layers; raises ScheduleError where the method cannot meet it.
        vision, language: the walked graphs.
        scores_attention: whether the cost of the attention statistics that ``schedule`` asks for is counted. What other methods spend on
            choosing is not, in their favour.
        image_share: instead of pruning, pictures are resized to this share of their visual tokens; None leaves them.
    """

    name: str
    schedule: Callable[[ModelShape, float], Schedule]
    vision: type[VisionGraph] = VisionGraph
    language: type[LanguageGraph] = LanguageGraph
    scores_attention: bool = True
    image_share: Callable[[float], float] | None = None

    @property
    def exportable(self) -> bool:
        """Whether its schedule is all there is to it, so that ``build --schedule`` makes an engine of it."""
        return self.vision is VisionGraph and self.language is LanguageGraph and self.image_share is None


def single_stage(shape: ModelShape, keep: float) -> Schedule:
    """One stage between merger and decoder, which keeps ``keep`` of the tokens."""
    if keep == 1:
        return Schedule()
    (kept,) = spend_keep(shape.decoder.layers, keep, (0,), lambda number, least, most: most)
    return Schedule(stages=(Stage("decoder", 0, kept),))
