"""``vflow-export serve``: an engine behind an OpenAI-compatible HTTP endpoint."""

from __future__ import annotations

from pathlib import Path

import click

from ..engines.batcher import DEFAULT_QUEUE_LIMIT, DEFAULT_SLOTS
from .console import err, one_line_errors

__all__ = ["serve"]


@click.command()
@click.argument("engine_path", metavar="ENGINE", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every network (set --api-key then).")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes any that is free.")
@click.option("--api-key", envvar="VFLOW_API_KEY", show_envvar=True, help="Clients must send it. In the environment nobody else sees it.")
@click.option("--name", help="Model name for clients.  [default: the one in the engine's manifest]")
@click.option("--slots", type=click.IntRange(1), help=f"Requests answered at a time.  [default: {DEFAULT_SLOTS}]")
@click.option("--kv-memory", help="Memory for KV caches, such as 2GiB, instead of --slots.")
@click.option("--queue-limit", type=click.IntRange(0), default=DEFAULT_QUEUE_LIMIT, show_default=True, help="Requests that may wait; more get 429.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=300.0, show_default=True, help="Seconds for a request, queue included.")
@click.option("--drain", type=click.FloatRange(0), default=30.0, show_default=True, help="Seconds for running requests after SIGTERM.")
@click.option("--max-body", default="32MiB", show_default=True, help="Largest request, images in it included.")
@click.option("--max-images", type=click.IntRange(1), default=16, show_default=True, help="Images of a request.")
@click.option("--max-image-pixels", type=click.IntRange(1), default=50_000_000, show_default=True, help="Pixels of all images of a request.")
@click.option("--allow-remote-images", "remote_hosts", multiple=True, metavar="HOST", help="Fetch https images from this host; repeatable.")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), help="Where ONNX Runtime computes.  [default: CUDA where present]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each graph.")
def serve(
    engine_path: Path, host: str, port: int, api_key: str | None, name: str | None, slots: int | None, kv_memory: str | None, queue_limit: int,
    timeout: float, drain: float, max_body: str, max_images: int, max_image_pixels: int, remote_hosts: tuple[str, ...], provider: str | None,
    threads: int | None,
) -> None:  # fmt: skip
    """Serve an engine to many clients at a time: chat completions as OpenAI's, streamed or not, with images as data: URLs.

    \b
    vflow-export serve out/tiny --slots 8
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
         -d '{"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}'
    """
    with one_line_errors():
        from ..engines import Batcher, open_engine
        from ..engines.errors import EngineError
        from .search_space import parse_bytes

        try:
            from ..engines.serve.options import ServeOptions
            from ..engines.serve.server import listen
            from ..engines.serve.server import serve as run
        except ImportError as error:
            raise EngineError(f"{error.name} is missing; pip install 'vflow-export[serve]'") from None
        options = ServeOptions(
            model=name,
            api_key=api_key,
            max_body_bytes=parse_bytes(max_body),
            max_images=max_images,
            max_image_pixels=max_image_pixels,
            remote_hosts=frozenset(remote.lower() for remote in remote_hosts),
            timeout=timeout,
        )
        memory = parse_bytes(kv_memory) if kv_memory is not None else None
        with listen(host, port) as listener:  # before anything large is loaded
            batcher = Batcher(open_engine(engine_path), slots=slots, kv_memory=memory, queue_limit=queue_limit, provider=provider, threads=threads)
            address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"
            ready = f"ready at {address}: {batcher.slots} slots, {batcher.stats().kv_bytes / 2**20:.1f} MiB of KV caches"
            run(batcher, listener, options, drain=drain, on_ready=lambda: err.print(ready, soft_wrap=True))
            err.print("stopped")
