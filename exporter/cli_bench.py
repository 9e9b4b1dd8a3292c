"""``vflow-export bench``: how fast engines are, beside each other and beside what users have today."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from .bench.subjects import BASELINES
from .console import one_line_errors, print_tables, progress_bar

__all__ = ["bench"]


@click.command()
@click.argument("engine_paths", metavar="ENGINE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--side", "sides", multiple=True, type=click.IntRange(1), default=[448], show_default=True, help="Pixels of the square image; repeatable."
)
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Tokens of the answer, whatever the model says.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Rounds that count.")
@click.option("--warm-up", type=click.IntRange(0), default=1, show_default=True, help="Rounds before them that do not.")
@click.option("--against", multiple=True, type=click.Choice(list(BASELINES)), help="Also time the same checkpoint there; repeatable.")
@click.option("--model", help="Checkpoint for --against.  [default: the one named in the first engine's manifest]")
@click.option(
    "--openvino-model", type=click.Path(path_type=Path, file_okay=False), help="Folder that optimum-intel exported, for --against openvino."
)
@click.option("--openvino-pruning-ratio", "pruning_ratios", multiple=True, type=click.IntRange(0, 99), default=[0], show_default=True,
              help="Per cent of visual tokens that OpenVINO GenAI drops; repeatable.")  # fmt: skip
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where everything computes.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: the cores that this process may use]")
@click.option("--one-at-a-time/--together", default=None, help="Hold one in memory, or all of them.  [default: what memory allows]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, every answer included, instead of tables.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the time to first token, part by part: .png, .svg, .pdf.")
def bench(
    engine_paths: tuple[Path, ...], sides: tuple[int, ...], new_tokens: int, repeats: int, warm_up: int, against: tuple[str, ...],
    model: str | None, openvino_model: Path | None, pruning_ratios: tuple[int, ...], provider: str, threads: int | None,
    one_at_a_time: bool | None, as_json: bool, plot: Path | None,
) -> None:  # fmt: skip
    """Time to first token, tokens per second, KV cache and memory, of engines in turns; the first is what the others are compared with.

    \b
    vflow-export bench out/tiny-unpruned out/tiny --side 448 --side 896 --against transformers
    """
    with one_line_errors():
        import tempfile
        from dataclasses import replace

        from ..engines import open_engine
        from .bench.report import bench_tables, bench_values
        from .bench.runner import measure_in_turns
        from .bench.subjects import baseline_specs, check_engines, engine_spec
        from .plots import check_plot, first_token_plot

        if plot is not None:
            check_plot(plot)
        used = threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
        engines = {str(path): open_engine(path, check_hashes=False) for path in engine_paths}
        check_engines(list(engines.values()), sides, new_tokens)
        specs = [engine_spec(engine, provider=provider, threads=used) for engine in engines.values()]
        with tempfile.TemporaryDirectory(prefix="vflow-bench-") as workspace, progress_bar() as progress:
            first = replace(specs[0], model=model) if model is not None else specs[0]
            for name in dict.fromkeys(against):
                specs += baseline_specs(
                    name, first, fingerprint=next(iter(engines.values())).model_fingerprint, openvino_model=openvino_model,
                    pruning_ratios=pruning_ratios, workspace=Path(workspace),
                )  # fmt: skip
            measured = measure_in_turns(
                specs, list(dict.fromkeys(sides)), new_tokens=new_tokens, repeats=repeats, warm_up=warm_up, one_at_a_time=one_at_a_time,
                progress=progress,
            )  # fmt: skip
        values = bench_values(measured, engines, threads=used)
        if as_json:
            click.echo(json.dumps(values))
        else:
            print_tables(*bench_tables(measured, engines))
            machine = values["machine"]
            versions = {name: version for result in measured for name, version in result.versions.items()}
            click.echo(f"{machine['date']}, {machine['processor']}, {machine['threads']} of {machine['cores']} cores, Python {machine['python']}, "
                       + ", ".join(f"{name} {version}" for name, version in versions.items()))  # fmt: skip
        if plot is not None:  # last: what was measured is shown even where drawing fails
            first_token_plot(values, plot)
