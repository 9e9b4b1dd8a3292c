"""``vflow-export evaluate`` and ``tune``: how good a schedule is, and how to find one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import click

from .console import err, one_line_errors, print_tables, progress_bar
from .presets import PRESET_NAMES
from .schedule import ScheduleError
from .tensorrt_llm import TENSORRT_LLM, search_for_tensorrt_llm

__all__ = ["evaluate", "tune"]

DEFAULT_TRIALS, DEFAULT_STARTUP = 200, 10
SEARCH_PRESETS = {"paper": (50, 10), "paper-code": (327, 27)}  # trials, and how many of them are random: the paper's section 4, and its research code


@click.command()
@click.argument("engine_paths", metavar="[ENGINE]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--model", help="Evaluate --method and --schedule in PyTorch, on this model: alias, checkpoint folder, or hub id.")
@click.option("--method", "methods", multiple=True, help="Pruning method, preset or 'all'; repeatable. 'list' shows them.")
@click.option("--keep", "keeps", multiple=True, type=click.FloatRange(0, 1, min_open=True), help="Average keep of --method; repeatable.")
@click.option("--schedule", "schedule_files", multiple=True, type=click.Path(path_type=Path, dir_okay=False), help="schedule.json; repeatable.")
@click.option("--reference", type=click.Path(path_type=Path), help="Unpruned engine of the same model, to state agreement of engines with.")
@click.option("--data", type=click.Path(path_type=Path), help="JSONL or folder.  [default: generated scenes of the small model]")
@click.option("--samples", type=click.IntRange(1), default=200, show_default=True, help="How many generated scenes.")
@click.option("--side", type=click.IntRange(56), default=448, show_default=True, help="Pixels of the generated, square scenes.")
@click.option("--kinds", help="Kinds of generated questions, comma-separated.  [default: those of the small model's bench]")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), help="Where ONNX Runtime computes.  [default: CUDA where present]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a result instead of a table.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw right answers (or agreement) against prefill FLOPs: .png, .svg, .pdf."
)
def evaluate(
    engine_paths: tuple[Path, ...], model: str | None, methods: tuple[str, ...], keeps: tuple[float, ...], schedule_files: tuple[Path, ...],
    reference: Path | None, data: Path | None, samples: int, side: int, kinds: str | None, provider: str | None, threads: int | None,
    as_json: bool, plot: Path | None,
) -> None:  # fmt: skip
    """Right answers and agreement with the unpruned model, of engines or of methods, on the same data, beside what they cost.

    \b
    vflow-export evaluate out/tiny out/tiny-unpruned
    vflow-export evaluate --model tiny --method all --keep 0.33 --keep 0.1
    """
    if "list" in methods:
        from .methods import METHODS

        click.echo("\n".join(dict.fromkeys((*PRESET_NAMES, *METHODS))))
        return
    if model is None and (methods or schedule_files or keeps):
        raise click.UsageError("--method, --keep and --schedule need --model")
    if not engine_paths and model is None:
        raise click.UsageError("name engines, or a --model with --method or --schedule")
    if model is not None and not (methods or schedule_files):
        raise click.UsageError("--model needs --method (with --keep) or --schedule")
    if methods and not keeps:
        raise click.UsageError("--method needs --keep")
    with one_line_errors():
        from ..engines import Session, open_engine
        from .data import generated_samples, read_samples
        from .evaluate import check_reference, evaluate_candidates, evaluate_session
        from .plots import NOTHING_TO_PLOT, check_plot, evaluation_plot
        from .report import evaluation_tables
        from .tiny.scenes import KINDS
        from .tiny.trained import BENCH_KINDS

        if plot is not None:
            check_plot(plot)
        chosen = kinds.split(",") if kinds else list(BENCH_KINDS)
        unknown = [kind for kind in chosen if kind not in KINDS]
        if unknown:
            raise click.UsageError(f"--kinds: {unknown[0]!r} is unknown; one of {', '.join(KINDS)}")
        questions = read_samples(data, labelled=False) if data is not None else list(generated_samples(samples, chosen, side))
        if plot is not None and engine_paths and reference is None and not any(question.answer for question in questions):
            raise ScheduleError(NOTHING_TO_PLOT)
        engines = [open_engine(path) for path in engine_paths]  # all that can be wrong is found before anything is asked
        whole = open_engine(reference) if reference is not None else None
        if whole is not None:
            for engine in engines:
                check_reference(engine, whole)
        results = []
        with progress_bar() as progress:
            if model is not None:
                import torch

                from .candidates import method_candidates, schedule_candidates
                from .checkpoint import open_checkpoint
                from .models import model_shape
                from .reference import ReferenceModel

                if threads is not None:
                    torch.set_num_threads(threads)
                progress("open checkpoint", 0.0)
                checkpoint = open_checkpoint(model)
                shape = model_shape(checkpoint.config)
                candidates, refused = method_candidates(methods, keeps, shape, checkpoint.fingerprint)
                candidates += schedule_candidates(schedule_files, shape, checkpoint.fingerprint)
                for reason in refused:
                    err.print(f"left out: {reason}", soft_wrap=True)
            unpruned = Session(whole, provider=provider, threads=threads) if whole is not None else None
            for path, engine in zip(engine_paths, engines, strict=True):
                session = Session(engine, provider=provider, threads=threads)
                results.append(evaluate_session(session, questions, name=str(path), reference=unpruned, progress=progress))
            if model is not None:
                results += evaluate_candidates(ReferenceModel(checkpoint), candidates, questions, progress=progress)
        if as_json:
            for result in results:
                click.echo(json.dumps(result.to_dict()))
        else:
            print_tables(*evaluation_tables(results))
        if plot is not None:
            evaluation_plot(results, plot)


@click.command()
@click.option("--model", required=True, help="Alias, checkpoint folder, or hub id.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="schedule.json to write; with --pareto a folder of them.")
@click.option("--data", type=click.Path(path_type=Path), help="JSONL or folder of image and prompt.  [default: generated scenes]")
@click.option("--samples", type=click.IntRange(1), default=108, show_default=True, help="How many samples to calibrate on.")
@click.option("--keep", type=float, help="Budget: average share of visual tokens over decoder layers.")
@click.option("--kv-budget", help="Budget: visual KV cache, such as 64MiB (fp16, at --side).")
@click.option("--prefill-flops", type=float, help="Budget: share of the unpruned prefill's FLOPs (at --side); allows stages inside the tower.")
@click.option("--pareto", type=click.Choice(["kv", "flops"]), help="The whole front of quality against this, instead of one schedule for a budget.")
@click.option("--side", type=click.IntRange(28), default=448, show_default=True, help="Pixels of the square image that budgets are counted for.")
@click.option("--text-tokens", type=click.IntRange(1), default=64, show_default=True, help="Prompt tokens that FLOPs are counted for.")
@click.option("--tower/--no-tower", default=None, help="Stages inside the vision tower.  [default: where FLOPs are asked for]")
@click.option("--guidance/--no-guidance", default=None, help="Let the last prompt token's attention take part in ranking.  [default: searched]")
@click.option(
    "--preset", type=click.Choice(list(SEARCH_PRESETS)), help="Search only what the paper does: 50 trials, or its research code's 27 + 300."
)
@click.option(
    "--objective", type=click.Choice(["overlap", "cosine"]), help="What is kept: the first token's distribution, or the hidden state, as in the "
    "paper and for prompts whose answers all begin alike.  [default: overlap; with --preset cosine]",
)  # fmt: skip
@click.option("--target", type=click.Choice([TENSORRT_LLM]), help="Search only what this runtime can run: one decoder stage, plain attention.")
@click.option("--trials", type=click.IntRange(1), help="Evaluations.  [default: 200]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--study", help="File or database URL that holds the search, to resume it or to share it between processes.")
@click.option("--study-name", default="vflow", show_default=True, help="Name of the search in --study.")
def tune(
    model: str, output: Path, data: Path | None, samples: int, keep: float | None, kv_budget: str | None, prefill_flops: float | None,
    pareto: str | None, side: int, text_tokens: int, tower: bool | None, guidance: bool | None, preset: str | None, objective: str | None,
    target: str | None, trials: int | None, seed: int, study: str | None, study_name: str,
) -> None:  # fmt: skip
    """Find a schedule for a budget by keeping the last token's representation where it was (VFlowOpt, section 3.4).

    \b
    vflow-export tune --model tiny --keep 0.1 --output schedule.json
    vflow-export tune --model tiny --keep 0.1 --prefill-flops 0.25 --output schedule.json
    vflow-export tune --model tiny --keep 0.1 --pareto flops --output front/
    """
    if preset is not None and (tower or guidance):
        raise click.UsageError("--preset has no tower stages and no guidance: leave out --tower and --guidance")
    if target is not None and (preset or guidance):
        raise click.UsageError(f"--target {target} has one decoder stage and no guidance: leave out --preset and --guidance")
    if pareto is None and keep is None and kv_budget is None and prefill_flops is None:
        raise click.UsageError("a budget is needed: --keep, --kv-budget or --prefill-flops (or --pareto)")
    if pareto == "kv" and (keep is not None or kv_budget is not None):
        raise click.UsageError("--pareto kv leaves the keep open: leave out --keep and --kv-budget")
    usual_trials, startup = SEARCH_PRESETS[preset] if preset else (DEFAULT_TRIALS, DEFAULT_STARTUP)
    count, beyond = trials or usual_trials, preset is None
    wants_tower = (prefill_flops is not None or pareto == "flops") if tower is None else tower
    with one_line_errors():
        from .build import image_processor
        from .checkpoint import open_checkpoint
        from .data import CALIBRATION_SEED, generated_samples, read_samples
        from .front import write_front
        from .models import model_shape
        from .outputs import check_file, check_folder
        from .report import front_table, schedule_lines
        from .search_space import Budget, SearchSpace, parse_bytes
        from .tiny.trained import BENCH_KINDS
        from .tune import FlowObjective, Measure, Resource, tune_front, tune_schedule

        if pareto is not None:
            check_folder(output)
        else:
            check_file(output, "schedule")
        budget = Budget(keep, parse_bytes(kv_budget) if kv_budget else None, prefill_flops, text_tokens=text_tokens)
        calibration = (
            read_samples(data, labelled=False, images_required=True)[:samples]
            if data
            else list(generated_samples(samples, BENCH_KINDS, side, seed=CALIBRATION_SEED))
        )
        with progress_bar() as progress:
            progress("open checkpoint", 0.0)
            checkpoint = open_checkpoint(model)
            shape = model_shape(checkpoint.config)
            processor = image_processor(checkpoint)  # which also scales what the search looks at
            rows, columns = (length // processor.factor for length in processor.resized(side, side))
            budget = replace(budget, rows=rows, columns=columns)
            space = SearchSpace.for_model(
                shape, budget, tower=beyond and wants_tower, guidance=beyond if guidance is None else guidance, paper=not beyond
            )
            if target is not None:
                space = search_for_tensorrt_llm(space)
            progress("calibrate", 0.0)
            measure: Measure = "cosine" if objective == "cosine" or (objective is None and preset) else "overlap"
            flow = FlowObjective(checkpoint, calibration, measure=measure, blocks=space.entry_blocks)
            search: dict[str, Any] = {
                "fingerprint": checkpoint.fingerprint, "trials": count, "seed": seed, "startup": startup, "storage": study, "study_name": study_name,
                "progress": lambda done, best: progress(f"trial {done} of {count}, best {measure} {best:.4f}", done / count),
            }  # fmt: skip
            if pareto is None:
                result = tune_schedule(flow, space, **search)
            else:
                resource: Resource = "kv" if pareto == "kv" else "flops"
                front = tune_front(flow, space, resource, **search)
        if pareto is not None:
            write_front(front, output, resource, measure)
            print_tables(front_table(front, resource, measure))
            click.echo(f"wrote {output}: a schedule a row, front.json" + (" and front.png" if (output / "front.png").exists() else ""))
            return
        result.schedule.save(output)
        for line in schedule_lines(result.schedule, flow.shape):
            click.echo(line)
        click.echo(f"prefill FLOPs {space.flops_share(result.schedule):.3f} of the unpruned at {side}×{side}")
        click.echo(f"mean {measure} {result.value:.4f} after {result.trials} trials; wrote {output}")
        runtime = f" --target {target}" if target is not None else ""
        click.echo(f"try next   vflow-export build --model {quote(model)} --schedule {quote(str(output))}{runtime} --output DIR")
