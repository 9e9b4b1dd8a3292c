"""How much faster a tuning trial is for not repeating what does not change, in one run.

python tools/measure_tuning.py --model tiny --samples 30
"""

from __future__ import annotations

import argparse
import time

import torch
from vflow.exporter.checkpoint import open_checkpoint
from vflow.exporter.data import CALIBRATION_SEED, generated_samples
from vflow.exporter.presets import PRESETS, preset_schedule
from vflow.exporter.tiny.trained import TRAINED_KINDS
from vflow.exporter.tune import CalibrationSample, FlowObjective


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    samples = [CalibrationSample(s.images, s.prompt) for s in generated_samples(args.samples, TRAINED_KINDS, args.side, seed=CALIBRATION_SEED)]
    objective = FlowObjective(open_checkpoint(args.model), samples, blocks=(2, 3, 4))
    print("| schedule | cosine | plain, s a trial | kept, s a trial | times faster |\n|---|---|---|---|---|")
    for name in PRESETS:
        schedule = preset_schedule(name, objective.shape, args.keep)
        objective.score(schedule)  # warm
        began = time.perf_counter()
        value = objective.score(schedule)
        kept = time.perf_counter() - began
        began = time.perf_counter()
        plain_value = objective.score_plainly(schedule)
        plain = time.perf_counter() - began
        assert abs(value - plain_value) < 1e-5
        print(f"| {name} | {value:.4f} | {plain:.2f} | {kept:.2f} | {plain / kept:.1f} |")


if __name__ == "__main__":
    main()
