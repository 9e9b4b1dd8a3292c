"""Tune the schedules that ship for a model: at the keeps of the paper's tables, without and with stages inside the tower.

From the smallest keep up: each search also tries the point found for the keep before it, which with more to spend is seldom worse. Of the leading
trials of several searches for a keep, the one is taken that does best on samples which none of them has seen: what a search reports is the best of
its trials on its own samples, and with few of them several points too good (docs/quality.md). The same samples choose its γ once more, which searches
often leave at the end of its range.

python tools/tune_presets.py --model tiny --output exporter/tuned
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from vflow.exporter.build import image_processor
from vflow.exporter.checkpoint import Checkpoint, open_checkpoint
from vflow.exporter.data import CALIBRATION_SEED, CalibrationSample, generated_samples
from vflow.exporter.models import model_shape
from vflow.exporter.report import schedule_lines
from vflow.exporter.schedule import Schedule
from vflow.exporter.search_space import Budget, SearchSpace
from vflow.exporter.tiny.trained import BENCH_KINDS
from vflow.exporter.tune import FlowObjective, tune_schedule

KEEPS = (0.33, 0.22, 0.11, 0.10, 0.05)
# Prefill FLOPs beside each keep, with tower stages. More cannot be saved for long: what the decoder keeps is what the tower must keep too.
TOWER_FLOPS = {0.33: 0.45, 0.22: 0.35, 0.11: 0.25, 0.10: 0.25, 0.05: 0.20}
TEXT_TOKENS = 12  # of the generated questions
GAMMAS = (1.0, 1.5, 2.0, 2.5, 3.0)  # tried for the schedule that is chosen
PART = 90  # samples that are judged at a time: each keeps its tower's states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--tower", action=argparse.BooleanOptionalAction, help="only with, or only without, tower stages")
    parser.add_argument("--samples", type=int, default=108)
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--judges", type=int, default=450, help="samples beside those of the searches, to choose between them")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="of the searches for each keep")
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.tower is not False and (unknown := set(args.keeps) - set(TOWER_FLOPS)):
        parser.error(f"no FLOPs are set for tower stages at keep {', '.join(map(str, sorted(unknown)))}: add them to TOWER_FLOPS, or --no-tower")
    torch.set_num_threads(args.threads)
    checkpoint = open_checkpoint(args.model)
    shape, processor = model_shape(checkpoint.config), image_processor(checkpoint)
    rows, columns = (length // processor.factor for length in processor.resized(args.side, args.side))
    blocks = SearchSpace.for_model(shape, Budget(), tower=True).entry_blocks
    samples = list(generated_samples(args.samples + args.judges, BENCH_KINDS, args.side, seed=CALIBRATION_SEED))
    judges = samples[args.samples :]
    objective = FlowObjective(checkpoint, samples[: args.samples], blocks=blocks)
    args.output.mkdir(parents=True, exist_ok=True)
    for tower in (False, True) if args.tower is None else (args.tower,):
        found: list[Mapping[str, float | str]] = []
        for keep in sorted(args.keeps):
            began = time.monotonic()
            budget = Budget(keep, prefill_flops=TOWER_FLOPS[keep] if tower else None, rows=rows, columns=columns, text_tokens=TEXT_TOKENS)
            space = SearchSpace.for_model(shape, budget, tower=tower, guidance=True)
            start = [*space.starts(), *found]
            searches = [
                tune_schedule(objective, space, fingerprint=checkpoint.fingerprint, trials=args.trials, seed=seed, start=start) for seed in args.seeds
            ]
            leaders = [(search, point) for search in searches for point in search.leaders]
            verdicts = judged(checkpoint, judges, [space.schedule(point) for _, point in leaders], blocks)
            search, point = leaders[int(np.argmax(verdicts))]
            found = [point]
            chosen, value, how = space.schedule(point), max(verdicts), f"of {len(leaders)} leading trials"
            if chosen.proportional_attention:
                others = [replace(chosen, proportional_attention=gamma) for gamma in GAMMAS]
                values = judged(checkpoint, judges, others, blocks)
                how += f" and {len(others)} values of γ for the best of them"
                if max(values) > value:
                    chosen, value = others[int(np.argmax(values))], max(values)
            choice = {"value": value, "chosen": f"{how}, on {len(judges)} other samples"}
            chosen = replace(chosen, model=checkpoint.fingerprint, provenance=search.schedule.provenance | choice)
            path = args.output / f"{Path(args.model).name}-keep-{keep:.2f}{'-tower' if tower else ''}.json"
            chosen.save(path)
            searched = ", ".join(f"{search.value:.4f}" for search in searches)
            print(
                f"{path}: overlap {value:.4f} on other samples (least of {len(verdicts)} leading trials {min(verdicts):.4f}; searches "
                f"reported {searched}), FLOPs {space.flops_share(chosen):.3f}, {time.monotonic() - began:.0f} s",
                flush=True,
            )
            for line in schedule_lines(chosen, shape):
                print(f"    {line}", flush=True)


def judged(checkpoint: Checkpoint, samples: Sequence[CalibrationSample], schedules: Sequence[Schedule], blocks: Sequence[int]) -> list[float]:
    """The objective of each schedule on samples that the searches have not seen; ``blocks`` as of their objective: where the tower is kept."""
    values = []
    for first in range(0, len(samples), PART):
        part = samples[first : first + PART]
        objective = FlowObjective(checkpoint, part, blocks=blocks)
        values.append([objective.score(schedule) * len(part) / len(samples) for schedule in schedules])
    return [float(value) for value in np.sum(values, axis=0)]


if __name__ == "__main__":
    main()
