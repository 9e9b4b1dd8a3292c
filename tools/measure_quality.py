"""The tables of docs/quality: every method at equal average keep and at equal prefill FLOPs, and what each part of ours is worth.

python tools/measure_quality.py --model tiny --samples 1080 --output docs/quality

Three parts: keep-K.json for every keep K, flops.json, ablations.json, each made only if it is not there, so that several processes can share the
work; then tables.md and the plots.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tune_presets import KEEPS, TEXT_TOKENS
from vflow.exporter.budget import prefill_flops
from vflow.exporter.build import image_processor
from vflow.exporter.candidates import UNPRUNED, method_candidates
from vflow.exporter.checkpoint import Checkpoint, open_checkpoint
from vflow.exporter.data import CALIBRATION_SEED, LabelledSample, generated_samples
from vflow.exporter.evaluate import Candidate, evaluate_candidates, wilson_interval
from vflow.exporter.methods import METHODS, Method
from vflow.exporter.plots import plot_lines
from vflow.exporter.presets import preset_schedule
from vflow.exporter.reference import ReferenceModel
from vflow.exporter.schedule import Schedule
from vflow.exporter.search_space import Budget, SearchSpace
from vflow.exporter.tiny.trained import BENCH_KINDS
from vflow.exporter.tune import FlowObjective, tune_schedule

FLOPS = (0.5, 0.25, 0.15)
SHRINKING = ("downsample", "pixelprune", "evoprune")  # methods that make the tower cheaper as well
ABLATION_KEEP = 0.10
ABLATIONS: dict[str, Mapping[str, float | str]] = {
    "everything searched": {},
    "without entropy (α = 0)": {"entropy_weight": 0.5},
    "without calibration (t = 0)": {"global_threshold": 0.0},
    "without recycling": {"recycle": 0.0},
    "without proportional attention (γ = 0)": {"proportional_attention": 0.0},
    "recycled, carry their own importance": {"recycle": 1.0, "recycled_importance": "own"},
    "recycled, carry the sum": {"recycle": 1.0, "recycled_importance": "sum"},
    "recycled, protected": {"recycle": 1.0, "recycled_importance": "protected"},
    "the last block ranks": {"vision_layer": 0.0},
    "single stage": {"decoder_keep_0": 0.0},
    "without text guidance": {"guidance_weight": 0.0},
}
OURS = ("progressive", "tuned", "tuned-tower")
PRESETS = {
    "progressive": "untuned (progressive)",
    "paper": "published settings, untuned (paper)",
    "tuned": "shipped, more trials (tuned)",
    "tuned-tower": "with tower stages (tuned-tower)",
}
Row = tuple[float, Candidate]  # the budget that it was made for, and what is evaluated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--samples", type=int, default=1080)
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--parts", nargs="+", choices=["keep", "flops", "ablations", "tables"], default=["keep", "flops", "ablations", "tables"])
    parser.add_argument("--methods", nargs="+", help="measure only these again, in a keep.json that is there: after their schedules have changed")
    parser.add_argument("--shard", type=int, default=0, help="answer every n-th question only, from this one on")
    parser.add_argument("--shards", type=int, default=1, help="n: so many processes share the questions")
    parser.add_argument("--trials", type=int, default=60, help="of each search in flops and ablations")
    parser.add_argument("--calibration", type=int, default=108, help="samples of each search")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    makers: dict[str, Callable[[], list[Row]]] = {"keep": bench.by_keep, "flops": bench.by_flops, "ablations": bench.ablations}
    if args.methods:
        bench.measure_again(args.output / "keep.json", args.methods)
    for part, make in makers.items():
        path = args.output / (f"{part}.json" if args.shards == 1 else f"{part}-{args.shard}-of-{args.shards}.json")
        if part in args.parts and not path.exists():
            path.write_text(json.dumps(bench.measure(make()), indent=1) + "\n")
    if "tables" in args.parts:
        write_tables(args.output)


def show(phase: str, share: float) -> None:
    if round(share * 1000) % 50 == 0:
        print(f"{phase} {share:.0%}", flush=True)


class Bench:
    """The model, the questions, and the candidates of each part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.checkpoint: Checkpoint = open_checkpoint(args.model)
        self.reference = ReferenceModel(self.checkpoint)
        self.shape = self.reference.shape
        self.questions: list[LabelledSample] = list(generated_samples(args.samples, BENCH_KINDS, args.side))[args.shard :: args.shards]
        self._objective: FlowObjective | None = None

    def measure(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The JSON document of one part."""
        results = evaluate_candidates(self.reference, [candidate for _, candidate in rows], self.questions, progress=show)
        setup = {"model": self.args.model, "samples": len(self.questions), "side": self.args.side}
        setup |= {"machine": f"{platform.machine()}, CPU", "torch": torch.__version__}
        return {"setup": setup, "results": [{"target": target, **result.to_dict()} for (target, _), result in zip(rows, results, strict=True)]}

    def measure_again(self, path: Path, methods: Sequence[str]) -> None:
        """Replace the rows of some methods in the document of the part ``keep``."""
        document = json.loads(path.read_text())
        if document["setup"]["samples"] != len(self.questions):
            raise SystemExit(f"{path} has {document['setup']['samples']} questions; give --samples so many")
        rows = self.by_keep()
        chosen = [number for number, (_, candidate) in enumerate(rows) if candidate.name in methods]
        for number, result in zip(chosen, self.measure([rows[number] for number in chosen])["results"], strict=True):
            old = document["results"][number]
            assert (old["name"], old["target"]) == (result["name"], result["target"])
            document["results"][number] = result
        path.write_text(json.dumps(document, indent=1) + "\n")

    def by_keep(self) -> list[Row]:
        """Every method at every average keep."""
        rows: list[Row] = [(1.0, Candidate("unpruned", UNPRUNED, Schedule()))]
        for keep in KEEPS:
            candidates, refused = method_candidates([*METHODS, *OURS], [keep], self.shape, self.checkpoint.fingerprint)
            rows += [(keep, candidate) for candidate in candidates[1:]]
            print("\n".join(refused), flush=True)
        return rows

    def by_flops(self) -> list[Row]:
        """Methods that shrink the tower too, each with the largest keep that meets the FLOPs; ours tuned for the FLOPs alone."""
        rows: list[Row] = [(1.0, Candidate("unpruned", UNPRUNED, Schedule()))]
        for flops in FLOPS:
            space = self.space(Budget(prefill_flops=flops), tower=True)
            for name in SHRINKING:
                method = METHODS[name]
                keep = next((k / 256 for k in range(256, 2, -1) if self.flops(space, method, k / 256) <= flops), None)
                if keep is not None:
                    shrink = method.image_share(keep) if method.image_share else 1.0
                    rows.append((flops, Candidate(name, method, method.schedule(self.shape, keep), shrink)))
            rows.append((flops, Candidate("tuned for FLOPs", UNPRUNED, self.tune(space, f"FLOPs {flops}"))))
        return rows

    def flops(self, space: SearchSpace, method: Method, keep: float) -> float:
        """Share of the unpruned prefill's FLOPs that a method spends; what it spends on choosing is not counted, in its favour."""
        grid = space.budget.rows
        sent = int(grid * keep**0.5) if method.image_share else grid
        schedule = method.schedule(self.shape, keep)
        spent = prefill_flops(schedule, self.shape, [(sent, sent)], text_tokens=TEXT_TOKENS, scoring=method.scores_attention)
        return spent / prefill_flops(Schedule(), self.shape, [(grid, grid)], text_tokens=TEXT_TOKENS)

    def ablations(self) -> list[Row]:
        """The search at one keep with one thing held fixed at a time; besides, what is not searched and what the tower adds."""
        rows: list[Row] = [(1.0, Candidate("unpruned", UNPRUNED, Schedule()))]
        for name, fixed in ABLATIONS.items():
            space = replace(self.space(Budget(ABLATION_KEEP)), fixed=tuple(fixed.items()))
            rows.append((ABLATION_KEEP, Candidate(name, UNPRUNED, self.tune(space, name))))
        for name, meaning in PRESETS.items():
            schedule = preset_schedule(name, self.shape, ABLATION_KEEP, fingerprint=self.checkpoint.fingerprint)
            rows.append((ABLATION_KEEP, Candidate(meaning, UNPRUNED, schedule)))
        return rows

    def space(self, budget: Budget, *, tower: bool = False) -> SearchSpace:
        processor = image_processor(self.checkpoint)
        grid = processor.resized(self.args.side, self.args.side)[0] // processor.factor
        return SearchSpace.for_model(self.shape, replace(budget, rows=grid, columns=grid, text_tokens=TEXT_TOKENS), tower=tower, guidance=True)

    def tune(self, space: SearchSpace, name: str) -> Schedule:
        if self._objective is None:
            samples = list(generated_samples(self.args.calibration, BENCH_KINDS, self.args.side, seed=CALIBRATION_SEED))
            blocks = self.space(Budget(), tower=True).entry_blocks
            self._objective = FlowObjective(self.checkpoint, samples, blocks=blocks)
        result = tune_schedule(self._objective, space, fingerprint=self.checkpoint.fingerprint, trials=self.args.trials)
        print(f"{name}: overlap {result.value:.4f}", flush=True)
        return result.schedule


def write_tables(folder: Path) -> None:
    """``tables.md`` and plots from the JSON files."""
    keep, ablations = load(folder, "keep"), load(folder, "ablations")
    flops = load(folder, "flops")["results"] if any(folder.glob("flops*.json")) else []
    setup, by_keep = keep["setup"], keep["results"]
    lines = [
        "<!-- Made by tools/measure_quality.py from the JSON files beside it. -->",
        "",
        f"{setup['samples']} held-out questions of {setup['side']}×{setup['side']} pixels, model `{setup['model']}`, "
        f"{setup['machine']}, PyTorch {setup['torch']}.",
        "",
        "### At equal average keep",
        "",
        "Right answers with their 95 % interval; — where a method cannot meet the budget.",
        "",
        *pivot(by_keep, KEEPS),
        "",
    ]
    for target in KEEPS:
        here = [by_keep[0], *(result for result in by_keep[1:] if result["target"] == target)]
        lines += [f"### At average keep {target}, per kind", "", *details(here), ""]
    if flops:
        lines += ["### At equal prefill FLOPs", "", *pivot(flops, FLOPS), "", *details(flops), ""]
    lines += [f"### Ablations, average keep {ABLATION_KEEP}", "", *details(ablations["results"]), ""]
    (folder / "tables.md").write_text("\n".join(lines))
    plot(by_keep, folder / "keep.png", "average_keep", "average keep")
    plot([*by_keep, *flops[1:]], folder / "flops.png", "prefill_flops", "prefill FLOPs, share of the unpruned")


def load(folder: Path, part: str) -> dict[str, Any]:
    """A part's document, put together where several processes have shared its questions."""
    whole = folder / f"{part}.json"
    if not whole.exists():
        shards = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{part}-*-of-*.json"))]
        results = [joined(results) for results in zip(*(shard["results"] for shard in shards), strict=True)]
        setup = {**shards[0]["setup"], "samples": sum(shard["setup"]["samples"] for shard in shards)}
        whole.write_text(json.dumps({"setup": setup, "results": results}, indent=1) + "\n")
    document: dict[str, Any] = json.loads(whole.read_text())
    return document


def joined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several over different questions; they have the same kinds in nearly the same numbers."""
    weights = np.array([result["total"]["n"] for result in results])

    def mean(*path: str) -> float:
        values = [reduce(lambda value, name: value[name], path, result) for result in results]
        return float(np.average(values, weights=weights))

    kinds = {kind: summed([result["by_kind"][kind] for result in results]) for kind in results[0]["by_kind"]}
    means = {name: mean(name) for name in ("average_keep", "prefill_flops", "visual_tokens", "kept")}
    agreement = {name: mean("agreement", name) for name in ("first_token", "overlap", "cosine")}
    return {**results[0], **means, "total": summed([result["total"] for result in results]), "by_kind": kinds, "agreement": agreement}


def summed(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    n, right = sum(score["n"] for score in scores), round(sum(score["accuracy"] * score["n"] for score in scores))
    return {"accuracy": right / n, "interval": wilson_interval(right, n), "n": n}


def plot(results: Sequence[Mapping[str, Any]], path: Path, cost: str, label: str) -> None:
    """Right answers against a cost, a line a method; what was made for FLOPs is a line of its own."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in sorted(results[1:], key=lambda result: float(result[cost])):
        lines.setdefault(result["name"], []).append((result[cost], result["total"]["accuracy"]))
    whole = results[0]["total"]["accuracy"]
    lines = {"unpruned": [(0.05, whole), (1.0, whole)], **lines}
    ours = ("tuned", "tuned-tower", "tuned for FLOPs")
    plot_lines(
        lines,
        path,
        cost=label,
        quality="share of right answers",
        title=f"Right answers against {label}",
        emphasised=(*ours, "downsample", "unpruned"),
    )


def pivot(results: Sequence[Mapping[str, Any]], targets: Sequence[float]) -> list[str]:
    """A row a method, a column a budget."""
    whole = results[0]["total"]
    lines = ["| | " + " | ".join(map(str, targets)) + " |", "|---|" + "---|" * len(targets)]
    lines.append("| unpruned | " + " | ".join([share(whole)] * len(targets)) + " |")
    cells = {(result["name"], result["target"]): result for result in results[1:]}
    for name in dict.fromkeys(result["name"] for result in results[1:]):
        found = [cells.get((name, target)) for target in targets]
        lines.append(f"| {name} | " + " | ".join(share(result["total"]) if result else "—" for result in found) + " |")
    return lines


def details(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row a result: cost, right answers, kinds, agreement."""
    kinds = list(results[0]["by_kind"])
    lines = ["| | keep | FLOPs | right | of unpruned | " + " | ".join(kinds) + " | first token | overlap | cosine |"]
    lines.append("|---|" + "---|" * (7 + len(kinds)))
    whole = results[0]["total"]["accuracy"]
    for result in results:
        by_kind = [f"{result['by_kind'][kind]['accuracy']:.2f}" for kind in kinds]
        total, agreement = result["total"], result["agreement"]
        row = [result["name"], f"{result['average_keep']:.3f}", f"{result['prefill_flops']:.3f}", share(total), f"{total['accuracy'] / whole:.3f}"]
        agreed = [f"{agreement['first_token']:.3f}", f"{agreement['overlap']:.3f}" if "overlap" in agreement else "", f"{agreement['cosine']:.4f}"]
        lines.append("| " + " | ".join([*row, *by_kind, *agreed]) + " |")
    return lines


def share(score: Mapping[str, Any]) -> str:
    low, high = score["interval"]
    return f"{score['accuracy']:.3f} ({low:.3f}–{high:.3f})"


if __name__ == "__main__":
    main()
