"""The target TensorRT-LLM: what its LLM API runs of a schedule, and a script that feeds it from the engine directory.

Nothing is built for it: TensorRT-LLM loads the checkpoint, and ``engines/tensorrt_llm.py`` gives it what the vision graph leaves of an image.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .budget import spend_keep
from .schedule import Schedule, Stage
from .search_space import SearchSpace

__all__ = ["SCRIPT_FILE", "TENSORRT_LLM", "schedule_for_tensorrt_llm", "search_for_tensorrt_llm", "write_script"]

TENSORRT_LLM = "tensorrt-llm"
ONE_STAGE = (("decoder_keep_0", 0.0), ("decoder_keep_1", 0.0), ("proportional_attention", 0.0))  # coordinates of a search space
SCRIPT_FILE = f"{TENSORRT_LLM}/generate.py"  # in an engine directory
SCRIPT = '''"""Asks TensorRT-LLM about pictures that this engine has pruned: python generate.py CHECKPOINT --image photo.jpg --prompt "What is this?"

Needs vflow-export, tensorrt-llm and an NVIDIA GPU. CHECKPOINT is the folder that the engine was built from.
"""

import argparse
from pathlib import Path

from vflow.engines import open_engine
from vflow.engines.tensorrt_llm import Feed, load_llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--image", action="append", default=[])
    parser.add_argument("--prompt", required=True)
    arguments = parser.parse_args()
    engine = open_engine(Path(__file__).resolve().parent.parent)
    feed, llm = Feed(engine), load_llm(engine, arguments.checkpoint)
    print(llm.generate(feed.inputs(arguments.prompt, arguments.image)).outputs[0].text)


if __name__ == "__main__":  # TensorRT-LLM starts processes, which import this file again
    main()
'''


def schedule_for_tensorrt_llm(schedule: Schedule, layers: int) -> Schedule:
    """A schedule without stages inside the decoder and without proportional attention, of the same average keep as nearly as whole numbers of 1024
    come below it.

    Stages of the tower stay: they keep at least what the average is, since keeps never grow. So does the merging of a first decoder stage. A
    schedule that TensorRT-LLM can run is returned as it is.
    """
    if not schedule.later_stages and not schedule.proportional_attention:
        return schedule
    (keep,) = spend_keep(layers, schedule.average_keep(layers), (0,), lambda number, least, most: most)
    first = replace(schedule.first_stage or Stage("decoder", 0, keep), keep=keep)
    stages = (*schedule.tower_stages, *([first] if schedule.later_stages or schedule.first_stage else []))
    provenance = {"tuned": False, "restricted_from": dict(schedule.provenance)}
    return replace(schedule, stages=stages, guidance_weight=0.0, proportional_attention=0.0, provenance=provenance)


def search_for_tensorrt_llm(space: SearchSpace) -> SearchSpace:
    """The part of a search space that TensorRT-LLM can run: one decoder stage, before layer 0, without guidance and proportional attention."""
    return replace(space, decoder_places=(), guidance=False, fixed=(*space.fixed, *ONE_STAGE))


def write_script(folder: Path) -> None:
    """Write the script into an engine directory."""
    file = folder / SCRIPT_FILE
    file.parent.mkdir()
    file.write_text(SCRIPT, encoding="utf-8")
