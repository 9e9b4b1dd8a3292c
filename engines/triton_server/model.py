"""What Triton Inference Server's Python backend calls: one batcher, and a thread for each request that it has taken.

The model folder's ``1/model.py`` imports :class:`TritonPythonModel` from here. One instance is enough, since the batcher's slots are the batch; a
second one would load the engine and allocate the KV caches once more. Responses are sent by the requests' own threads, because sending waits for
the server, and neither the batcher nor Triton's own thread must.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from threading import Condition, Event, Lock, Semaphore, Thread
from typing import Any

import numpy as np

from ..batcher import Batcher
from ..directory import open_engine
from ..errors import EngineError, QueueFull, RequestCancelled, RequestTimeout, ShuttingDown
from ..gauges import GAUGES
from ..results import GenerationResult
from ..ticket import Ticket
from .inputs import read_inputs
from .interface import OUTPUTS
from .settings import Settings

__all__ = ["TritonPythonModel"]

WATCH_SECONDS = 0.1  # how soon a client that has gone is noticed, and how old a gauge may be
STUCK_SECONDS = 30  # without a turn for the watcher, which nothing here takes a tenth of; see _watch
READERS = 2  # requests whose images are unpacked at a time: a picture may take 0.25 GiB while it is
DTYPES = {"STRING": np.object_, "INT64": np.int64, "FP64": np.float64}
SHOWN = ("queued", "active", "slots")  # of the gauges: setting one is a call to the server


class TritonPythonModel:
    """The engine that config.pbtxt names, behind Triton's protocols."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the engine.

        Raises:
            TritonModelException: it cannot be loaded on this machine, or config.pbtxt is wrong; the server then says so and does not become ready.
        """
        import triton_python_backend_utils as triton

        self._server = os.getppid()
        self._triton = triton
        config = json.loads(args["model_config"])
        self._decoupled: bool = triton.using_decoupled_model_transaction_policy(config)
        try:
            settings = Settings.from_config(config)
            self._batcher = Batcher(
                open_engine(settings.engine_path(args["model_repository"])),
                slots=settings.slots,
                kv_memory=settings.kv_memory,
                queue_limit=settings.queue_limit,
                provider=settings.provider,
                threads=settings.threads,
            )
        except EngineError as error:
            raise triton.TritonModelException(str(error)) from None
        self._drain = settings.drain
        self._reading = Semaphore(READERS)
        self._changed = Condition()  # guards _live
        self._live: set[_Exchange] = set()
        self._stopped = Event()
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._families = {field: triton.MetricFamily(*GAUGES[field], triton.MetricFamily.GAUGE) for field in SHOWN}
        self._gauges = {field: family.Metric(labels=labels) for field, family in self._families.items()}
        self._shown: dict[str, int] = {}
        self._showing = Lock()
        self._show()
        self._watcher = Thread(target=self._watch, name="vflow watcher", daemon=True)
        self._watcher.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests; each is answered through its response sender, in whatever order they end."""
        for request in requests:
            exchange = _Exchange(self._triton, request.get_response_sender(), self._show)
            with self._changed:
                full = sum(one.open for one in self._live) >= self._batcher.slots + self._batcher.queue_limit
                if not full:
                    self._live.add(exchange)
            if full:
                exchange.fail(QueueFull(f"{self._batcher.queue_limit} requests are waiting already; try again later"))
            else:
                try:
                    Thread(target=self._answer, args=(request, exchange), name="vflow request", daemon=True).start()
                except RuntimeError as error:  # no more threads: this request's misfortune, and not the batch's
                    exchange.fail(error)
                    self._ended(exchange)

    def finalize(self) -> None:
        """Give answers under way ``drain`` seconds to end, then stop."""
        print(f"vflow: stopping; answers under way have {self._drain:g} s", file=sys.stderr, flush=True)  # into the server's log
        self._batcher.close(drain=self._drain)
        with self._changed:
            self._changed.wait_for(lambda: not self._live)
        self._stopped.set()
        self._watcher.join()

    def _answer(self, request: Any, exchange: _Exchange) -> None:
        """One request from its tensors to its last response, in a thread of its own."""
        try:
            with self._reading:
                inputs = read_inputs({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
                stream = self._decoupled if inputs.stream is None else inputs.stream
                if stream and not self._decoupled:
                    raise EngineError("input stream needs a model whose config.pbtxt has the decoupled transaction policy")
                ticket = exchange.ticket = self._batcher.submit(
                    inputs.prompt,
                    inputs.images,
                    max_new_tokens=inputs.max_new_tokens,
                    sampling=inputs.sampling,
                    stop=inputs.stop,
                    keep_scale=inputs.keep_scale,
                    max_pixels=inputs.max_pixels,
                    timeout=inputs.timeout,
                )
            del request, inputs  # and with them the memory that is shared with the server
            for piece in ticket:
                if stream:
                    exchange.send({"text": piece})
            result = ticket.result()
            exchange.finish(outputs_of(result, text="" if stream else result.text))
        except EngineError as error:
            exchange.fail(error)
        except Exception as error:  # whatever it is, it is this request's, and somebody waits for its end
            exchange.fail(error)
            raise
        finally:
            self._ended(exchange)

    def _ended(self, exchange: _Exchange) -> None:
        with self._changed:
            self._live.discard(exchange)
            self._changed.notify_all()

    def _watch(self) -> None:
        """Cancel what no client waits for any more, and keep the gauges.

        Where the server was killed, this process would outlive it with the engine's memory: it ends when its parent has changed. Triton's calls hold
        Python's lock while they wait for the server, though, which they then do for ever; faulthandler's own thread, set before the first wait, ends
        that, since no thread of Python's can.
        """
        while True:
            faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True, file=2)
            self._look_after_all()
            if self._stopped.wait(WATCH_SECONDS):
                break
            if os.getppid() != self._server:
                os._exit(1)  # nobody is left to finalize for
        faulthandler.cancel_dump_traceback_later()

    def _look_after_all(self) -> None:
        """One turn of the watcher. A frame of its own, in which no ended request lives on: Triton unloads no model while it does."""
        with self._changed:
            live = list(self._live)
        for exchange in live:
            try:
                exchange.look_after()
            except Exception:  # one client's; the others are watched on, and this process must not seem stuck
                traceback.print_exc()

    def _show(self) -> None:
        """Set the gauges that have changed. Only while a request is open: a server that unloads the model does not answer."""
        with self._showing:
            stats = self._batcher.stats()
            for field, gauge in self._gauges.items():
                value = getattr(stats, field)
                if self._shown.get(field) != value:
                    gauge.set(value)
                    self._shown[field] = value


class _Exchange:
    """A request's way back to its client. After the last response nothing goes through it any more, and nobody must ask it anything.

    ``show`` brings the gauges up to date, and is called only while the request is open.
    """

    def __init__(self, triton: Any, sender: Any, show: Callable[[], None]) -> None:
        self.ticket: Ticket | None = None  # once there is one
        self._triton, self._sender, self._show = triton, sender, show
        self._lock = Lock()  # guards open
        self.open = True

    def send(self, outputs: Mapping[str, Any]) -> None:
        """A response that is not the last one."""
        self._sender.send(self._response(outputs))

    def finish(self, outputs: Mapping[str, Any]) -> None:
        """The last response."""
        self._end(self._response(outputs))

    def fail(self, error: Exception) -> None:
        """The last response of a request that has none."""
        codes = self._triton.TritonError
        if isinstance(error, RequestCancelled):
            code = codes.CANCELLED
        elif isinstance(error, (QueueFull, ShuttingDown, RequestTimeout)):
            code = codes.UNAVAILABLE
        else:
            asked = isinstance(error, EngineError) and self.ticket is None  # what was taken, and failed then, is not the client's fault
            code = codes.INVALID_ARG if asked else codes.INTERNAL
        message = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        self._end(self._triton.InferenceResponse(error=codes(message, code)))

    def look_after(self) -> None:
        """Bring the gauges up to date, and cancel the ticket where the client has gone."""
        with self._lock:
            if self.open:
                self._show()
                if self.ticket is not None and self._sender.is_cancelled():
                    self.ticket.cancel()

    def _end(self, response: Any) -> None:
        with self._lock:
            self._show()
            self.open = False
            self._sender.send(response, flags=self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _response(self, outputs: Mapping[str, Any]) -> Any:
        tensors = [
            self._triton.Tensor(spec.name, np.array([outputs[spec.name]], DTYPES[spec.dtype]))
            for spec in OUTPUTS
            if outputs.get(spec.name) is not None
        ]
        return self._triton.InferenceResponse(tensors)


def outputs_of(result: GenerationResult, *, text: str) -> dict[str, Any]:
    """The outputs of the last response, by name."""
    return {
        "text": text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.token_ids),
        "visual_tokens": result.visual_tokens,
        "visual_tokens_kept": result.visual_tokens_kept,
        "vision_s": result.vision_s,
        "prefill_s": result.prefill_s,
        "ttft_s": result.ttft_s,
        "tokens_per_s": result.tokens_per_s,
    }
