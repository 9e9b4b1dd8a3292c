"""Schedules that between them use every option, those of the model whose tower looks at windows but for blocks 1 and 3, and those of the model whose
blocks 0 and 2 give features to the first two decoder layers."""

from __future__ import annotations

from support import DECODER_STAGES
from vflow.exporter.schedule import Importance, Schedule, Stage, unpruned_schedule

SCHEDULES: dict[str, Schedule] = {
    "unpruned": unpruned_schedule(),
    "decoder": DECODER_STAGES,
    "tower and decoder": Schedule(
        (Stage("tower", 1, 800, 2.5), Stage("tower", 2, 600), Stage("decoder", 0, 400, 2.0), Stage("decoder", 1, 300), Stage("decoder", 3, 100)),
        Importance(global_threshold=1.3, entropy_weight=0.3),
        recycled_importance="sum",
    ),
    "pixels": Schedule((Stage("tower", 0, 700, 3.0), Stage("decoder", 0, 350)), Importance(vision_layer=1), renumber_first_stage=True),
    "first stage only": Schedule((Stage("decoder", 0, 450, 1.7),), Importance(global_threshold=50.0)),
    "protected": Schedule((Stage("decoder", 0, 450, 2.0), Stage("decoder", 2, 200)), recycled_importance="protected"),
    "guided, no first stage": Schedule((Stage("decoder", 1, 600), Stage("decoder", 2, 300)), guidance_weight=0.4),
    "sampled rows": Schedule((Stage("tower", 2, 700), Stage("decoder", 0, 450)), Importance(score_rows=300)),
    "sampled rows, global": Schedule((Stage("tower", 1, 700), Stage("decoder", 0, 450)), Importance(global_threshold=1.2, score_rows=400)),
    "proportional": Schedule(
        (Stage("tower", 0, 850, 1.6), Stage("tower", 2, 700), Stage("decoder", 0, 400, 2.0), Stage("decoder", 2, 200)),
        guidance_weight=0.3,
        proportional_attention=1.7,
    ),
    "guidance alone": Schedule((Stage("decoder", 0, 700), Stage("decoder", 3, 300)), guidance_weight=1.0),
}

WINDOWED_SCHEDULES: dict[str, Schedule] = {
    "windows": Schedule((Stage("tower", 2, 600, 2.0), Stage("decoder", 0, 400), Stage("decoder", 2, 150)), Importance(1.3, 0.3), guidance_weight=0.3),
    "windows, twice by one block": Schedule(  # of a tower stage between blocks that look everywhere, the earlier of these ranks
        (Stage("tower", 0, 900, 3.0), Stage("tower", 2, 700), Stage("tower", 3, 500), Stage("decoder", 0, 300, 2.5)),
        Importance(entropy_weight=-0.4),
        proportional_attention=1.5,
    ),
    "windows, decoder ranked earlier": Schedule((Stage("decoder", 0, 450),), Importance(vision_layer=-2)),  # which is block 1
}

DEEPSTACK_SCHEDULES: dict[str, Schedule] = {
    "deepstack": Schedule(
        (Stage("tower", 1, 800, 2.5), Stage("tower", 3, 600), Stage("decoder", 0, 450, 2.0), Stage("decoder", 1, 300), Stage("decoder", 3, 100)),
        Importance(global_threshold=1.3, entropy_weight=0.3),
        recycled_importance="sum",
        guidance_weight=0.3,
    ),
    "deepstack, proportional": Schedule(
        (Stage("tower", 0, 850, 1.6), Stage("tower", 2, 700), Stage("decoder", 0, 400, 2.0), Stage("decoder", 2, 200)), proportional_attention=1.7
    ),
    "deepstack, first stage": Schedule((Stage("decoder", 0, 450, 1.7),)),
}
