"""How much faster a tuning trial is for not repeating what does not change, in one run.

python tools/measure_tuning.py --model tiny --samples 30
"""

from __future__ import annotations

import argparse
import time

import torch
from vflow.exporter.checkpoint import open_checkpoint
from vflow.exporter.data import CALIBRATION_SEED, generated_samples
from vflow.exporter.models import model_shape
from vflow.exporter.presets import PRESETS, preset_schedule, tuned_schedule
from vflow.exporter.tiny.trained import BENCH_KINDS
from vflow.exporter.tune import FlowObjective


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    samples = list(generated_samples(args.samples, BENCH_KINDS, args.side, seed=CALIBRATION_SEED))
    checkpoint = open_checkpoint(args.model)
    shape = model_shape(checkpoint.config)
    tuned = [name for name in ("tuned", "tuned-tower") if tuned_schedule(checkpoint.fingerprint, args.keep, tower=name != "tuned")]
    schedules = {name: preset_schedule(name, shape, args.keep, fingerprint=checkpoint.fingerprint) for name in (*PRESETS, *tuned)}
    objective = FlowObjective(checkpoint, samples, blocks=sorted({s.tower_stages[0].layer for s in schedules.values() if s.tower_stages}))
    print("| schedule | overlap | plain, s a trial | kept, s a trial | times faster |\n|---|---|---|---|---|")
    for name, schedule in schedules.items():
        objective.score(schedule)  # warm
        began = time.perf_counter()
        value = objective.score(schedule)
        kept = time.perf_counter() - began
        began = time.perf_counter()
        plain_value = objective.score_plainly(schedule)
        plain = time.perf_counter() - began
        assert abs(value - plain_value) < 1e-4
        print(f"| {name} | {value:.4f} | {plain:.2f} | {kept:.2f} | {plain / kept:.1f} |", flush=True)


if __name__ == "__main__":
    main()
