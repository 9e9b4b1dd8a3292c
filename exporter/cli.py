"""``vflow-export``: the command line. Results on stdout, progress on stderr; exit code 2 for wrong usage, 1 for a failed job."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from shlex import quote

import click

from ..engines.graphs import RUNTIMES
from ..engines.manifest import PRECISIONS, WEIGHTS
from .checkpoint import ALIASES
from .cli_bench import bench
from .cli_quality import evaluate, tune
from .cli_serve import serve
from .cli_triton import triton_repository
from .console import one_line_errors, print_tables, progress_bar, stop_on_signals
from .presets import DEFAULT_MAX_TEXT_TOKENS, DEFAULT_MAX_VISUAL_TOKENS, DEFAULT_PRESET, PRESET_NAMES, preset_schedule, tuned_schedule
from .tensorrt_llm import SCRIPT_FILE, TENSORRT_LLM, schedule_for_tensorrt_llm

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="vflow-export")
def main() -> None:
    """Compile vision-language models with pruned visual tokens into engines.

    \b
    vflow-export build --model tiny --keep 0.1 --output out/tiny
    vflow-export run out/tiny --image picture.png --prompt "how many objects are there ?"
    """
    stop_on_signals()
    warnings.filterwarnings("ignore", message="Image size", module="PIL")  # of images that are refused by our own line


main.add_command(bench)
main.add_command(evaluate)
main.add_command(serve)
main.add_command(tune)
main.add_command(triton_repository)


@main.command()
@click.option("--model", required=True, help=f"Alias ({', '.join(ALIASES)}), checkpoint folder, or hub id.")
@click.option("--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Engine directory to write.")
@click.option("--keep", type=click.FloatRange(0, 1, min_open=True), help="Average share of visual tokens that decoder layers keep.")
@click.option("--preset", type=click.Choice(PRESET_NAMES), help=f"Schedule for --keep.  [default: tuned where there is one, else {DEFAULT_PRESET}]")
@click.option("--schedule", "schedule_file", type=click.Path(path_type=Path, dir_okay=False), help="schedule.json instead of --keep.")
@click.option(
    "--precision", type=click.Choice(list(PRECISIONS)), default="fp32", show_default=True, help="bf16 is for tensorrt-rtx and tensorrt alone."
)
@click.option(
    "--weights", type=click.Choice(WEIGHTS), default="full", show_default=True, help="Bits of the decoder's projections; full is --precision."
)
@click.option("--target", "targets", multiple=True, type=click.Choice((*RUNTIMES, TENSORRT_LLM)), default=["onnxruntime"], show_default=True,
              help="Build for this runtime; repeatable. ONNX Runtime takes the graphs, tensorrt needs a GPU, tensorrt-llm one stage.")  # fmt: skip
@click.option("--compute-capability", "capabilities", multiple=True,
              help="GPU (8.9, 12.0, …) that tensorrt-rtx builds for, or without it that the ops' kernels are compiled for; repeatable.")  # fmt: skip
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
    model: str, output: Path, keep: float | None, preset: str | None, schedule_file: Path | None, precision: str, weights: str,
    targets: tuple[str, ...], capabilities: tuple[str, ...], max_visual_tokens: int, max_text_tokens: int, force: bool,
) -> None:  # fmt: skip
    """Export a model with its pruning schedule baked in, into an engine directory.

    Without --keep and --schedule nothing is pruned.
    """
    if schedule_file is not None and (keep is not None or preset is not None):
        raise click.UsageError("--schedule says what is kept: leave out --keep and --preset")
    if preset is not None and keep is None:
        raise click.UsageError("--preset needs --keep")
    origin = f"from {schedule_file}" if schedule_file is not None else "none, nothing is pruned"
    with one_line_errors():
        from .build import BuildOptions, build_engine
        from .checkpoint import open_checkpoint
        from .models import model_shape
        from .report import build_table
        from .schedule import load_schedule, unpruned_schedule
        from .tensorrt.targets import check_targets

        engines_for = tuple(dict.fromkeys(target for target in targets if target != "onnxruntime"))
        check_targets(engines_for, capabilities)  # before a checkpoint is downloaded
        schedule = load_schedule(schedule_file) if schedule_file is not None else None
        with progress_bar() as progress:
            progress("open checkpoint", 0.0)
            checkpoint = open_checkpoint(model)
        if schedule is None and keep is not None:
            tuned = tuned_schedule(checkpoint.fingerprint, keep) is not None
            name = preset or ("tuned" if tuned else DEFAULT_PRESET)
            schedule = preset_schedule(name, model_shape(checkpoint.config), keep, fingerprint=checkpoint.fingerprint)
            if schedule.stages:  # none at keep 1
                origin = f"preset {name}, " + ("tuned for this model" if schedule.provenance.get("tuned", True) else "not tuned for this model")
                if preset is None and not tuned and sys.stdin.isatty():
                    question = f"No schedule is tuned for keep {keep:g} (vflow-export tune makes one). Build with the untuned preset {name}?"
                    click.confirm(question, default=True, abort=True, err=True)
            if TENSORRT_LLM in engines_for:
                able = schedule_for_tensorrt_llm(schedule, checkpoint.config.text_config.num_hidden_layers)
                if able is not schedule:
                    schedule = able
                    origin = f"preset {name}, as {TENSORRT_LLM} can run it: one decoder stage, plain attention, the same average keep; not tuned"
        with progress_bar() as progress:
            options = BuildOptions(precision, max_visual_tokens, max_text_tokens, force, capabilities, engines_for, weights)
            engine = build_engine(checkpoint, schedule or unpruned_schedule(), output, options, progress=progress)
        print_tables(build_table(engine))
        click.echo(f"schedule   {origin}")
        click.echo(f"engine     {output}")
        click.echo(f"try next   vflow-export run {quote(str(output))} --image FILE --prompt TEXT")
        if TENSORRT_LLM in engines_for:
            script, source = quote(str(output / SCRIPT_FILE)), quote(str(checkpoint.path))
            click.echo(f"           python {script} {source} --image FILE --prompt TEXT")


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
@click.option("--target", type=click.Choice(RUNTIMES), default="onnxruntime", show_default=True, help="What runs it, of what it was built for.")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), help="Where ONNX Runtime computes.  [default: CUDA where present]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of ONNX Runtime.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def run(
    engine_path: Path, images: tuple[str, ...], prompt: str, max_new_tokens: int | None, temperature: float, top_k: int, top_p: float,
    seed: int | None, max_pixels: int | None, target: str, provider: str | None, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Answer a prompt about images, streaming the text, then say what it took."""
    with one_line_errors():
        from ..engines import SamplingParams, Session, open_engine
        from ..engines.preprocess import load_image

        sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        pixels = [load_image(image) for image in images]  # before anything large is loaded
        session = Session(open_engine(engine_path), target=target, provider=provider, threads=threads)
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
@click.option(
    "--target", type=click.Choice(RUNTIMES), default="onnxruntime", show_default=True, help="Compare this target's engines with ONNX Runtime."
)
@click.option("--bisect", "bisecting", is_flag=True, help="Where something differs, name the first node that does.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def verify(
    engine_path: Path, model: str | None, images: tuple[str, ...], prompt: str, samples: int, target: str, bisecting: bool, as_json: bool
) -> None:
    """Compare an engine with the Hugging Face model and the PyTorch reference; exit code 1 if a difference is too large.

    With --target, compare the engines built for it with ONNX Runtime instead.
    """
    with one_line_errors():
        from ..engines import Session, open_engine
        from ..engines.preprocess import load_image
        from .checkpoint import open_checkpoint
        from .report import verify_table
        from .verify import VerifyInput, generated_inputs, verify_engine
        from .verify_target import bisect, verify_target

        engine = open_engine(engine_path)
        inputs = [VerifyInput(load_image(image), prompt) for image in images] or generated_inputs(samples)
        began = time.monotonic()
        with progress_bar() as progress:
            if target == "onnxruntime":
                findings = verify_engine(engine, open_checkpoint(model or engine.model_name), inputs, progress=progress)
            else:
                findings = verify_target(Session(engine, target=target), target, inputs, progress=progress)
            passed = all(finding.passed for finding in findings)
            parting = bisect(engine, target, inputs, progress=progress) if bisecting and not passed else None
        if as_json:
            values = {"passed": passed, "findings": [vars(f) for f in findings], "parting": vars(parting) if parting else None}
            click.echo(json.dumps(values))
        else:
            print_tables(verify_table(engine, findings, len(inputs), time.monotonic() - began))
            if bisecting and not passed:
                click.echo(
                    parting or "No node of the graphs differs from what it computes without optimisation: the graphs are not those of the model."
                )
    if not passed:
        raise click.ClickException("verification failed; do not deploy this engine")


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
