"""Ask the small model about one picture, unpruned and pruned, side by side.

    python tools/demo.py out/tiny-unpruned out/tiny-keep-10

Exit code 1 if the pruned engine answers fewer than half of the questions rightly.
"""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote

import numpy as np
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from vflow.engines import Session, open_engine
from vflow.engines.results import GenerationResult
from vflow.exporter.report import bytes_text
from vflow.exporter.tiny.scenes import ask, render, sample_scene
from vflow.exporter.tiny.trained import TRAINED_KINDS

PICTURE = Path("out/demo.png")
SCENE_SEED = 7_654_321  # held out from training
SIDE = 448  # pixels: 256 visual tokens


def main(paths: list[str]) -> int:
    rng = np.random.default_rng(SCENE_SEED)
    scene = sample_scene(rng, width=SIDE, height=SIDE, min_objects=4, max_objects=4)
    questions = [question for kind in TRAINED_KINDS if (question := ask(scene, rng, kind))]
    PICTURE.parent.mkdir(exist_ok=True)
    Image.fromarray(render(scene)).save(PICTURE)

    sessions = [Session(open_engine(path)) for path in paths]
    keeps = [s.engine.schedule.average_keep(s.engine.shape.decoder.layers) for s in sessions]
    names = [f"keep {keep:.2f}" if keep < 1 else "unpruned" for keep in keeps]
    answers = Table(title=f"{PICTURE} ({SIDE}×{SIDE}), asked of both engines", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("question", "right answer", *names):
        answers.add_column(heading)
    results: list[list[GenerationResult]] = [[] for _ in sessions]
    for question in questions:
        row = []
        for session, taken in zip(sessions, results, strict=True):
            taken.append(session.generate(question.prompt, [PICTURE]))
            right = taken[-1].text == question.answer
            row.append(f"{'✓' if right else '✗'} {taken[-1].text}")
        answers.add_row(question.prompt, question.answer, *row)

    costs = Table(box=SIMPLE_HEAD)
    for heading in ("", *names):
        costs.add_column(heading)
    last = [taken[-1] for taken in results]
    costs.add_row("visual tokens", *(_tokens(result) for result in last))
    costs.add_row("KV cache, visual part", *(bytes_text(result.kv_bytes.visual) for result in last))
    for label, name in (("vision", "vision_s"), ("prefill", "prefill_s"), ("time to first token", "ttft_s")):
        costs.add_row(label, *(f"{1e3 * float(np.median([getattr(r, name) for r in taken])):.0f} ms" for taken in results))
    speeds = [[r.tokens_per_s for r in taken if r.tokens_per_s is not None] for taken in results]
    costs.add_row("decoding", *(f"{np.median(values):.0f} tokens/s" for values in speeds))
    console = Console(markup=False, emoji=False)
    console.print(answers)
    console.print(costs)
    right = sum(r.text == q.answer for r, q in zip(results[-1], questions, strict=True))
    left = last[-1].stages[-1].kept if last[-1].stages else last[-1].visual_tokens
    console.print(f"{right} of {len(questions)} answers right with {left} of {last[-1].visual_tokens} visual tokens left. Ask your own:")
    console.print(f'vflow-export run {quote(paths[-1])} --image {PICTURE} --prompt "..."', soft_wrap=True)
    return 0 if 2 * right >= len(questions) else 1


def _tokens(result: GenerationResult) -> str:
    return " → ".join(str(count) for count in (result.visual_tokens, *(stage.kept for stage in result.stages)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
