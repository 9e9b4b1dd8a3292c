"""Time to first token of several engines of one model, in one run, beside the limit that arithmetic sets.

    python tools/measure_prefill.py out/2b-unpruned out/2b-keep-10 out/2b-tower --side 896

The first engine is the yardstick; it is measured again at the end, so that drift of the machine shows. Engines run one after another, each in
a process of its own (large ones do not fit beside each other), after a small image that pages the weights in.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from vflow.engines import Session, open_engine
from vflow.exporter.budget import cost
from vflow.exporter.schedule import unpruned_schedule

PROMPT = "list the objects from left to right ."
WARM_UP_SIDE = 56  # pixels


def measure(path: str, side: int, threads: int | None) -> dict[str, Any]:
    """One engine: seconds, visual tokens, and FLOPs from the schedule."""
    engine = open_engine(path, check_hashes=False)
    session = Session(engine, provider="cpu", threads=threads)
    rng = np.random.default_rng(0)
    for size in (WARM_UP_SIDE, side):
        image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        result = session.generate(PROMPT, [image], max_new_tokens=2)
    tokens = side // engine.image_processor.factor
    text = result.prompt_tokens - (result.stages[-1].kept if result.stages else result.visual_tokens)
    arithmetic = {"rows": tokens, "columns": tokens, "text_tokens": text}
    pruned = cost(engine.schedule, engine.shape, **arithmetic)
    full = cost(unpruned_schedule(), engine.shape, **arithmetic)
    return {
        "engine": path,
        "visual_tokens": [result.visual_tokens, *(stage.kept for stage in result.stages)],
        "vision_s": result.vision_s,
        "prefill_s": result.prefill_s,
        "ttft_s": result.ttft_s,
        "tflop": pruned.flops / 1e12,
        "limit": full.flops / pruned.flops,
        "kv_visual_bytes": result.kv_bytes.visual,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+")
    parser.add_argument("--side", type=int, default=896, help="pixels of the square image (28 a visual token)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.engines[0], args.side, args.threads)))
        return
    rows = []
    for path in [*args.engines, args.engines[0]]:
        command = [sys.executable, __file__, path, "--side", str(args.side), "--one"]
        command += ["--threads", str(args.threads)] if args.threads else []
        finished = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(finished.stdout.splitlines()[-1]))
        print(f"measured {path}: {rows[-1]['ttft_s']:.1f} s", file=sys.stderr, flush=True)
    print(f"{datetime.now(timezone.utc):%Y-%m-%d}, {platform.machine()}, Python {platform.python_version()}\n")
    print("| engine | visual tokens | vision s | prefill s | first token s | speed-up | limit | of limit |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        speed_up = rows[0]["ttft_s"] / row["ttft_s"]
        tokens = " → ".join(map(str, row["visual_tokens"]))
        print(f"| {Path(row['engine']).name} | {tokens} | {row['vision_s']:.1f} | {row['prefill_s']:.1f} | {row['ttft_s']:.1f} "
              f"| {speed_up:.2f} | {row['limit']:.2f} | {speed_up / row['limit']:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
