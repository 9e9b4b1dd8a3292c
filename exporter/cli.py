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

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..engines.errors import EngineError
from .presets import DEFAULT_MAX_TEXT_TOKENS, DEFAULT_MAX_VISUAL_TOKENS, DEFAULT_PRESET, PRESETS, preset_schedule
from .schedule import ScheduleError

__all__ = ["main"]

err = Console(stderr=True)
_stopped = Event()  # Python drops an exception that a signal raises inside a destructor or callback; long jobs look here


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what users can mend into one line on stderr and exit code 1."""
    from ..plugins.compile import CompileError
    from .checkpoint import CheckpointError
    from .evaluate import DataError

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
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
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
@click.option("--preset", type=click.Choice(list(PRESETS)), help=f"Schedule for --keep.  [default: {DEFAULT_PRESET}]")
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
                schedule = preset_schedule(preset or DEFAULT_PRESET, model_shape(checkpoint.config), keep)
            options = BuildOptions(precision, max_visual_tokens, max_text_tokens, force, capabilities)
            engine = build_engine(checkpoint, schedule or unpruned_schedule(), output, options, progress=progress)
        Console().print(build_table(engine))
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
@click.argument("engine_paths", metavar="ENGINE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path, dir_okay=False), help="Labelled JSONL.  [default: generated scenes of the small model]")
@click.option("--samples", type=click.IntRange(1), default=200, show_default=True, help="How many generated scenes.")
@click.option("--side", type=click.IntRange(56), default=448, show_default=True, help="Pixels of the generated, square scenes.")
@click.option("--kinds", help="Kinds of generated questions, comma-separated.  [default: those the small model was trained for]")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), help="Where ONNX Runtime computes.  [default: CUDA where present]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object an engine instead of a table.")
def evaluate(
    engine_paths: tuple[Path, ...], data: Path | None, samples: int, side: int, kinds: str | None, provider: str | None,
    threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Share of right answers of one or several engines on the same labelled data, per kind of question."""
    with one_line_errors():
        from ..engines import Session, open_engine
        from .evaluate import evaluate_session, generated_samples, read_samples
        from .report import evaluation_table
        from .tiny.scenes import KINDS
        from .tiny.trained import TRAINED_KINDS

        chosen = kinds.split(",") if kinds else list(TRAINED_KINDS)
        unknown = [kind for kind in chosen if kind not in KINDS]
        if unknown:
            raise click.UsageError(f"--kinds: {unknown[0]!r} is unknown; one of {', '.join(KINDS)}")
        questions = read_samples(data) if data is not None else list(generated_samples(samples, chosen, side))
        results = []
        with progress_bar() as progress:
            for path in engine_paths:
                session = Session(open_engine(path), provider=provider, threads=threads)
                results.append(evaluate_session(session, questions, name=str(path), progress=progress))
        if as_json:
            for result in results:
                click.echo(json.dumps(result.to_dict()))
        else:
            Console().print(evaluation_table(results))


@main.command()
@click.option("--model", required=True, help="Alias, checkpoint folder, or hub id.")
@click.option("--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="schedule.json to write.")
@click.option("--data", type=click.Path(path_type=Path, dir_okay=False), help="JSONL of image and prompt.  [default: generated scenes]")
@click.option("--samples", type=click.IntRange(1), default=30, show_default=True, help="How many samples to calibrate on.")
@click.option("--keep", type=float, help="Budget: average share of visual tokens over decoder layers.")
@click.option("--kv-budget", help="Budget: visual KV cache, such as 64MiB (fp16, at --side).")
@click.option("--prefill-flops", type=float, help="Budget: share of the unpruned prefill's FLOPs, tower and decoder together (at --side).")
@click.option("--side", type=click.IntRange(28), default=448, show_default=True, help="Pixels of the square image that budgets are counted for.")
@click.option("--tower-stages", type=click.IntRange(0, 3), default=0, show_default=True, help="Stages inside the vision tower.")
@click.option("--guidance", is_flag=True, help="Let the last prompt token's attention take part in ranking.")
@click.option("--preset", type=click.Choice(["paper"]), help="Search only what the paper searches.")
@click.option("--trials", type=click.IntRange(1), default=50, show_default=True, help="Evaluations; the paper has 50.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--study", help="File or database URL that holds the search, to resume it or to share it between processes.")
def tune(
    model: str, output: Path, data: Path | None, samples: int, keep: float | None, kv_budget: str | None, prefill_flops: float | None,
    side: int, tower_stages: int, guidance: bool, preset: str | None, trials: int, seed: int, study: str | None,
) -> None:  # fmt: skip
    """Find a schedule for a budget by keeping the last token's representation where it was (VFlowOpt, section 3.4)."""
    if preset == "paper" and (tower_stages or guidance):
        raise click.UsageError("--preset paper has no tower stages and no guidance: leave out --tower-stages and --guidance")
    with one_line_errors():
        from .checkpoint import open_checkpoint
        from .evaluate import CALIBRATION_SEED, generated_samples, read_samples
        from .models.qwen2_vl import model_shape
        from .report import schedule_lines
        from .search_space import Budget, SearchSpace, parse_bytes
        from .tiny.trained import TRAINED_KINDS
        from .tune import CalibrationSample, FlowObjective, tune_schedule

        tokens = max(1, side // 28)
        budget = Budget(keep, parse_bytes(kv_budget) if kv_budget else None, prefill_flops, rows=tokens, columns=tokens)
        labelled = read_samples(data, labelled=False)[:samples] if data else generated_samples(samples, TRAINED_KINDS, side, seed=CALIBRATION_SEED)
        calibration = [CalibrationSample(sample.images[0], sample.prompt) for sample in labelled if sample.images]
        with progress_bar() as progress:
            progress("open checkpoint", 0.0)
            checkpoint = open_checkpoint(model)
            shape, paper = model_shape(checkpoint.config), preset == "paper"
            space = SearchSpace.for_model(shape, budget, tower_stages=tower_stages, guidance=guidance, paper=paper)
            progress("calibrate", 0.0)
            objective = FlowObjective(checkpoint, calibration, blocks=space.tower_blocks)
            result = tune_schedule(
                objective, space, fingerprint=checkpoint.fingerprint, trials=trials, seed=seed, storage=study,
                progress=lambda trial, best: progress(f"best cosine {best:.4f}", trial / trials),
            )  # fmt: skip
        result.schedule.save(output)
        for line in schedule_lines(result.schedule, objective.shape):
            click.echo(line)
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
