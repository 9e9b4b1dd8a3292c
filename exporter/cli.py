"""``vflow-export``: the command line. Results on stdout, progress on stderr; exit code 2 for wrong usage, 1 for a failed job."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..engines.errors import EngineError
from .presets import DEFAULT_MAX_TEXT_TOKENS, DEFAULT_MAX_VISUAL_TOKENS, DEFAULT_PRESET, PRESET_NAMES, preset_schedule, tuned_schedule
from .schedule import ScheduleError

__all__ = ["main"]

DEFAULT_TRIALS, DEFAULT_STARTUP = 200, 10
SEARCH_PRESETS = {"paper": (50, 10), "paper-code": (327, 27)}  # trials, and how many of them are random: the paper's section 4, and its research code
err = Console(stderr=True)
_stopped = Event()  # Python drops an exception that a signal raises inside a destructor or callback; long jobs look here


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what users can mend into one line on stderr and exit code 1."""
    from ..plugins.compile import CompileError
    from .checkpoint import CheckpointError
    from .data import DataError

    try:
        yield
    except (CheckpointError, CompileError, DataError, EngineError, ScheduleError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; nothing was left behind") from None
    except MemoryError:
        raise click.ClickException("out of memory; choose a smaller model or --precision fp16") from None
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'system'}: {error.strerror or error}") from None


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """A bar that shows phase and share done, on stderr; nothing where stderr is not a terminal but the phases."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("start", total=1.0)
        last = ""

        def report(phase: str, share: float) -> None:
            nonlocal last
            if _stopped.is_set():
                raise KeyboardInterrupt
            if phase != last and not err.is_terminal:
                err.print(f"{phase} ...")
            last = phase
            bar.update(task, description=phase, completed=share)

        yield report


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="vflow-export")
def main() -> None:
    """Compile vision-language models with pruned visual tokens into engines.

    \b
    vflow-export build --model tiny --keep 0.1 --output out/tiny
    vflow-export run out/tiny --image picture.png --prompt "how many objects are there ?"
    """
    _stopped.clear()
    signal.signal(signal.SIGTERM, _interrupt)  # so that a stopped build cleans up as after Ctrl-C
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(*_: object) -> None:
    _stopped.set()
    raise KeyboardInterrupt


@main.command()
@click.option("--model", required=True, help="Alias (tiny, qwen2-vl, qwen2-vl-7b, qwen2-vl-72b), checkpoint folder, or hub id.")
@click.option("--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Engine directory to write.")
@click.option("--keep", type=click.FloatRange(0, 1, min_open=True), help="Average share of visual tokens that decoder layers keep.")
@click.option("--preset", type=click.Choice(PRESET_NAMES), help=f"Schedule for --keep.  [default: tuned where there is one, else {DEFAULT_PRESET}]")
@click.option("--schedule", "schedule_file", type=click.Path(path_type=Path, dir_okay=False), help="schedule.json instead of --keep.")
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True)
@click.option("--target", "targets", multiple=True, type=click.Choice(["onnxruntime"]), default=["onnxruntime"], show_default=True)
@click.option("--compute-capability", "capabilities", multiple=True, help="Compile the ops' kernels for this GPU (8.9, 9.0, …); repeatable.")
@click.option(
    "--max-visual-tokens",
    type=click.IntRange(1),
    default=DEFAULT_MAX_VISUAL_TOKENS,
    show_default=True,
    help="Visual tokens of a request before pruning.",
)
@click.option("--max-text-tokens", type=click.IntRange(1), default=DEFAULT_MAX_TEXT_TOKENS, show_default=True, help="Tokens of prompt and answer.")
@click.option("--force", is_flag=True, help="Replace an engine that is already there.")
def build(
    model: str, output: Path, keep: float | None, preset: str | None, schedule_file: Path | None, precision: str,
    targets: tuple[str, ...], capabilities: tuple[str, ...], max_visual_tokens: int, max_text_tokens: int, force: bool,
) -> None:  # fmt: skip
    """Export a model with its pruning schedule baked in, into an engine directory.

    Without --keep and --schedule nothing is pruned.
    """
    if schedule_file is not None and (keep is not None or preset is not None):
        raise click.UsageError("--schedule says what is kept: leave out --keep and --preset")
    if preset is not None and keep is None:
        raise click.UsageError("--preset needs --keep")
    del targets  # one so far; every engine directory serves it
    origin = f"from {schedule_file}" if schedule_file is not None else "none, nothing is pruned"
    with one_line_errors():
        from .build import BuildOptions, build_engine
        from .checkpoint import open_checkpoint
        from .models.qwen2_vl import model_shape
        from .report import build_table
        from .schedule import load_schedule, unpruned_schedule

        schedule = load_schedule(schedule_file) if schedule_file is not None else None
        with progress_bar() as progress:
            progress("open checkpoint", 0.0)
            checkpoint = open_checkpoint(model)
        if schedule is None and keep is not None:
            tuned = tuned_schedule(checkpoint.fingerprint, keep) is not None
            name = preset or ("tuned" if tuned else DEFAULT_PRESET)
            schedule = preset_schedule(name, model_shape(checkpoint.config), keep, fingerprint=checkpoint.fingerprint)
            origin = f"preset {name}, " + ("tuned for this model" if schedule.provenance.get("tuned", True) else "not tuned for this model")
            if preset is None and not tuned and sys.stdin.isatty():
                question = f"No schedule is tuned for keep {keep:g} (vflow-export tune makes one). Build with the untuned preset {name}?"
                click.confirm(question, default=True, abort=True, err=True)
        with progress_bar() as progress:
            options = BuildOptions(precision, max_visual_tokens, max_text_tokens, force, capabilities)
            engine = build_engine(checkpoint, schedule or unpruned_schedule(), output, options, progress=progress)
        Console().print(build_table(engine))
        click.echo(f"schedule   {origin}")
        click.echo(f"engine     {output}")
        click.echo(f"try next   vflow-export run {output} --image FILE --prompt TEXT")


@main.command()
@click.argument("engine_path", metavar="ENGINE", type=click.Path(path_type=Path))
@click.option("--image", "images", multiple=True, help="Image file; repeat for several, in the order in which the prompt sees them.")
@click.option("--prompt", required=True, help="Question or instruction.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Longest answer.  [default: 256, or what fits]")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="Sample from the k likeliest tokens; 0 from all.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Sample from the likeliest share.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--max-pixels", type=click.IntRange(1), help="Scale images down to at most this many pixels.")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), help="Where ONNX Runtime computes.  [default: CUDA where present]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def run(
    engine_path: Path, images: tuple[str, ...], prompt: str, max_new_tokens: int | None, temperature: float, top_k: int, top_p: float,
    seed: int | None, max_pixels: int | None, provider: str | None, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Answer a prompt about images, streaming the text, then say what it took."""
    with one_line_errors():
        from ..engines import SamplingParams, Session, open_engine
        from ..engines.preprocess import load_image

        sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        pixels = [load_image(image) for image in images]  # before anything large is loaded
        session = Session(open_engine(engine_path), provider=provider, threads=threads)
        write = (lambda text: None) if as_json else (lambda text: click.echo(text, nl=False))
        result = session.generate(prompt, pixels, max_new_tokens=max_new_tokens, sampling=sampling, max_pixels=max_pixels, on_text=write)
        if as_json:
            click.echo(json.dumps(result.to_dict()))
            return
        click.echo()
        sys.stdout.flush()
        from .report import run_lines

        for line in run_lines(result):
            click.echo(line, err=True)


@main.command()
@click.argument("engine_path", metavar="ENGINE", type=click.Path(path_type=Path))
@click.option("--model", help="Checkpoint that the engine was built from.  [default: the one named in its manifest]")
@click.option("--image", "images", multiple=True, help="Images to verify on.  [default: generated scenes of five sizes]")
@click.option("--prompt", default="how many objects are there ?", show_default=True, help="Asked about each --image.")
@click.option("--samples", type=click.IntRange(1), default=20, show_default=True, help="How many generated scenes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def verify(engine_path: Path, model: str | None, images: tuple[str, ...], prompt: str, samples: int, as_json: bool) -> None:
    """Compare an engine with the Hugging Face model and the PyTorch reference; exit code 1 if a difference is too large."""
    with one_line_errors():
        from ..engines import open_engine
        from ..engines.preprocess import load_image
        from .checkpoint import open_checkpoint
        from .report import verify_table
        from .verify import VerifyInput, generated_inputs, verify_engine

        engine = open_engine(engine_path)
        inputs = [VerifyInput(load_image(image), prompt) for image in images] or generated_inputs(samples)
        began = time.monotonic()
        with progress_bar() as progress:
            findings = verify_engine(engine, open_checkpoint(model or engine.model_name), inputs, progress=progress)
        if as_json:
            click.echo(json.dumps({"passed": all(f.passed for f in findings), "findings": [vars(f) for f in findings]}))
        else:
            Console().print(verify_table(engine, findings, len(inputs), time.monotonic() - began))
    if not all(finding.passed for finding in findings):
        raise click.ClickException("verification failed; do not deploy this engine")


@main.command()
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
        from .evaluate import evaluate_candidates, evaluate_session
        from .report import evaluation_tables
        from .tiny.scenes import KINDS
        from .tiny.trained import BENCH_KINDS

        chosen = kinds.split(",") if kinds else list(BENCH_KINDS)
        unknown = [kind for kind in chosen if kind not in KINDS]
        if unknown:
            raise click.UsageError(f"--kinds: {unknown[0]!r} is unknown; one of {', '.join(KINDS)}")
        questions = read_samples(data, labelled=False) if data is not None else list(generated_samples(samples, chosen, side))
        results = []
        with progress_bar() as progress:
            unpruned = Session(open_engine(reference), provider=provider, threads=threads) if reference is not None else None
            for path in engine_paths:
                session = Session(open_engine(path), provider=provider, threads=threads)
                results.append(evaluate_session(session, questions, name=str(path), reference=unpruned, progress=progress))
            if model is not None:
                import torch

                from .candidates import method_candidates, schedule_candidates
                from .checkpoint import open_checkpoint
                from .reference import ReferenceModel

                if threads is not None:
                    torch.set_num_threads(threads)
                progress("open checkpoint", 0.0)
                checkpoint = open_checkpoint(model)
                loaded = ReferenceModel(checkpoint)
                candidates, refused = method_candidates(methods, keeps, loaded.shape, checkpoint.fingerprint)
                candidates += schedule_candidates(schedule_files, loaded.shape, checkpoint.fingerprint)
                for reason in refused:
                    err.print(f"left out: {reason}", highlight=False)
                results += evaluate_candidates(loaded, candidates, questions, progress=progress)
        if plot is not None:
            from .plots import evaluation_plot

            evaluation_plot(results, plot)
        if as_json:
            for result in results:
                click.echo(json.dumps(result.to_dict()))
        else:
            for table in evaluation_tables(results):
                Console().print(table)


@main.command()
@click.option("--model", required=True, help="Alias, checkpoint folder, or hub id.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="schedule.json to write; with --pareto a folder of them.")
@click.option("--data", type=click.Path(path_type=Path), help="JSONL or folder of image and prompt.  [default: generated scenes]")
@click.option("--samples", type=click.IntRange(1), default=30, show_default=True, help="How many samples to calibrate on.")
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
@click.option("--trials", type=click.IntRange(1), help="Evaluations.  [default: 200]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--study", help="File or database URL that holds the search, to resume it or to share it between processes.")
@click.option("--study-name", default="vflow", show_default=True, help="Name of the search in --study.")
def tune(
    model: str, output: Path, data: Path | None, samples: int, keep: float | None, kv_budget: str | None, prefill_flops: float | None,
    pareto: str | None, side: int, text_tokens: int, tower: bool | None, guidance: bool | None, preset: str | None, trials: int | None, seed: int,
    study: str | None, study_name: str,
) -> None:  # fmt: skip
    """Find a schedule for a budget by keeping the last token's representation where it was (VFlowOpt, section 3.4).

    \b
    vflow-export tune --model tiny --keep 0.1 --output schedule.json
    vflow-export tune --model tiny --keep 0.1 --prefill-flops 0.25 --output schedule.json
    vflow-export tune --model tiny --keep 0.1 --pareto flops --output front/
    """
    if preset is not None and (tower or guidance):
        raise click.UsageError("--preset has no tower stages and no guidance: leave out --tower and --guidance")
    if pareto is None and keep is None and kv_budget is None and prefill_flops is None:
        raise click.UsageError("a budget is needed: --keep, --kv-budget or --prefill-flops (or --pareto)")
    usual_trials, startup = SEARCH_PRESETS[preset] if preset else (DEFAULT_TRIALS, DEFAULT_STARTUP)
    count, beyond = trials or usual_trials, preset is None
    wants_tower = (prefill_flops is not None or pareto == "flops") if tower is None else tower
    with one_line_errors():
        from .checkpoint import open_checkpoint
        from .data import CALIBRATION_SEED, generated_samples, read_samples
        from .front import write_front
        from .models.qwen2_vl import model_shape
        from .report import front_table, schedule_lines
        from .search_space import Budget, SearchSpace, parse_bytes
        from .tiny.trained import BENCH_KINDS
        from .tune import CalibrationSample, FlowObjective, Resource, tune_front, tune_schedule

        tokens = max(1, side // 28)
        budget = Budget(keep, parse_bytes(kv_budget) if kv_budget else None, prefill_flops, tokens, tokens, text_tokens)
        found = (
            read_samples(data, labelled=False, images_required=True)[:samples]
            if data
            else generated_samples(samples, BENCH_KINDS, side, seed=CALIBRATION_SEED)
        )
        calibration = [CalibrationSample(sample.images, sample.prompt) for sample in found]
        with progress_bar() as progress:
            progress("open checkpoint", 0.0)
            checkpoint = open_checkpoint(model)
            shape = model_shape(checkpoint.config)
            space = SearchSpace.for_model(
                shape, budget, tower=beyond and wants_tower, guidance=beyond if guidance is None else guidance, paper=not beyond
            )
            progress("calibrate", 0.0)
            objective = FlowObjective(checkpoint, calibration, blocks=space.tower_places)
            search: dict[str, Any] = {
                "fingerprint": checkpoint.fingerprint, "trials": count, "seed": seed, "startup": startup, "storage": study, "study_name": study_name,
                "progress": lambda done, best: progress(f"trial {done} of {count}, best cosine {best:.4f}", done / count),
            }  # fmt: skip
            if pareto is None:
                result = tune_schedule(objective, space, **search)
            else:
                resource: Resource = "kv" if pareto == "kv" else "flops"
                front = tune_front(objective, space, resource, **search)
        if pareto is not None:
            write_front(front, output, resource)
            Console().print(front_table(front, resource))
            click.echo(f"wrote {output}: a schedule a row, front.json" + (" and front.png" if (output / "front.png").exists() else ""))
            return
        result.schedule.save(output)
        for line in schedule_lines(result.schedule, objective.shape):
            click.echo(line)
        click.echo(f"prefill FLOPs {space.flops_share(result.schedule):.3f} of the unpruned at {side}×{side}")
        click.echo(f"mean cosine {result.value:.4f} after {result.trials} trials; wrote {output}")
        click.echo(f"try next   vflow-export build --model {model} --schedule {output} --output DIR")


@main.command()
def doctor() -> None:
    """Say what this machine can build and run, and what to install for the rest. Exit code 1 if it cannot run engines."""
    from .doctor import examine

    findings = examine()
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        click.echo(f"{'ok     ' if finding.ok else 'missing'}  {finding.what:<{width}}  {finding.detail}")
    if not all(finding.ok for finding in findings if finding.required):
        raise click.exceptions.Exit(1)
