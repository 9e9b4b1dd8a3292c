"""``vflow-export triton-repository``: the Triton server model of an engine with other parameters than ``build`` gave it."""

from __future__ import annotations

import shutil
from pathlib import Path
from shlex import quote

import click

from ..engines.batcher import DEFAULT_SLOTS
from ..engines.triton_server.settings import DEFAULT_QUEUE_LIMIT
from .console import one_line_errors

__all__ = ["triton_repository"]


@click.command("triton-repository")
@click.argument("engine_path", metavar="ENGINE", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Model repository; it may hold other models.")
@click.option("--name", help="Of the Triton model.  [default: the name that build gave it]")
@click.option("--engine-path", "path_there", help="Where the server will find the engine.  [default: where it is now]")
@click.option("--slots", type=click.IntRange(1), help=f"Requests answered at a time.  [default: {DEFAULT_SLOTS}]")
@click.option("--kv-memory", help="Memory for KV caches, such as 4GiB, instead of --slots.")
@click.option("--queue-limit", type=click.IntRange(0), default=DEFAULT_QUEUE_LIMIT, show_default=True, help="Requests that may wait.")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), help="Where ONNX Runtime computes.  [default: CUDA where present]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each graph.")
@click.option("--whole", is_flag=True, help="Answers in one piece, for clients that call infer: Triton does not let them call a model that streams.")
def triton_repository(
    engine_path: Path, output: Path, name: str | None, path_there: str | None, slots: int | None, kv_memory: str | None,
    queue_limit: int, provider: str | None, threads: int | None, whole: bool,
) -> None:  # fmt: skip
    """Write a Triton Inference Server model of ENGINE with parameters of your own.

    What build leaves in ENGINE/triton is one with the defaults; it is part of the engine and not to be edited. Where ENGINE was built for
    TensorRT, its vision engine is written as a second model, NAME-vision.
    """
    if slots is not None and kv_memory is not None:
        raise click.UsageError("--slots and --kv-memory say the same: give one of them")
    with one_line_errors():
        from ..engines import open_engine
        from ..engines.batcher import slots_in
        from ..engines.triton_server.settings import Settings
        from .search_space import parse_bytes
        from .triton_repository import VISION_TARGET, repository_name, write_model, write_vision_model

        engine = open_engine(engine_path, check_hashes=False)
        memory = None if kv_memory is None else parse_bytes(kv_memory)
        if memory is not None:
            slots_in(engine, memory)  # says so here where it holds no request
        where = path_there or str(engine.path.resolve())
        settings = Settings(where, slots, memory, queue_limit, provider, threads)
        name = name or repository_name(engine.model_name)
        folders = [write_model(output, name, settings, stream=not whole)]
        if VISION_TARGET in engine.targets:
            try:
                folders.append(write_vision_model(output, name, where, engine.targets[VISION_TARGET].vision))
            except BaseException:
                shutil.rmtree(folders[0], ignore_errors=True)
                raise
        for folder in folders:
            click.echo(f"model      {folder}")
        click.echo(f"try next   tritonserver --model-repository={quote(str(output))}")
