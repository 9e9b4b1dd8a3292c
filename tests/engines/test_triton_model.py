"""Triton's model beside a stand-in for Triton's Python utilities: what a real server cannot be made to do at will."""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vflow.engines import Engine
from vflow.engines.triton_server import model as model_module
from vflow.engines.triton_server.model import TritonPythonModel

PATIENCE = 30.0


class TritonError(Exception):
    CANCELLED, UNAVAILABLE, INVALID_ARG, INTERNAL = range(4)


class Sender:
    """Of one request's responses; the client may be one of whom Triton cannot say whether he is gone."""

    def __init__(self, is_cancelled: Callable[[], bool]) -> None:
        self.responses: list[Any] = []
        self.ended = threading.Event()
        self.is_cancelled = is_cancelled

    def send(self, response: Any, flags: int = 0) -> None:
        self.responses.append(response)
        if flags:
            self.ended.set()


class Request:
    def __init__(self, is_cancelled: Callable[[], bool] = lambda: False, **inputs: Any) -> None:
        self.sender = Sender(is_cancelled)
        self._inputs = [SimpleNamespace(name=lambda name=name: name, as_numpy=lambda value=value: value) for name, value in inputs.items()]

    def get_response_sender(self) -> Sender:
        return self.sender

    def inputs(self) -> list[Any]:
        return self._inputs


def request(**options: Any) -> Request:
    return Request(prompt=np.array([b"hello"], object), max_new_tokens=np.array([20]), **options)


def slow_down(model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the watcher has turns while a request is answered."""
    language = model._batcher.backend.language

    def slow(**inputs: Any) -> Any:
        time.sleep(0.02)
        return language(**inputs)

    monkeypatch.setattr(model._batcher.backend, "language", slow)


@pytest.fixture
def model(standin: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[TritonPythonModel]:
    triton: Any = ModuleType("triton_python_backend_utils")
    triton.TritonError, triton.TritonModelException, triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL = TritonError, Exception, 1
    triton.using_decoupled_model_transaction_policy = lambda config: True
    triton.MetricFamily = lambda *_: SimpleNamespace(Metric=lambda labels: SimpleNamespace(set=lambda value: None))
    triton.MetricFamily.GAUGE = 0
    triton.Tensor = lambda name, values: (name, values)
    triton.InferenceResponse = lambda tensors=None, error=None: SimpleNamespace(tensors=tensors, error=error)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    armed: list[float] = []
    monkeypatch.setattr(
        model_module, "faulthandler", SimpleNamespace(
            dump_traceback_later=lambda seconds, **_: armed.append(seconds), cancel_dump_traceback_later=armed.clear
        ),
    )  # fmt: skip
    config = {"parameters": {"engine": {"string_value": str(standin.path)}, "slots": {"string_value": "2"}}}
    made = TritonPythonModel()
    made.initialize({"model_config": json.dumps(config), "model_repository": "/", "model_name": "model", "model_version": "1"})
    yield made
    made.finalize()
    assert armed == []


def test_a_client_of_whom_triton_cannot_say_whether_he_is_gone_disturbs_nobody(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = threading.Event()

    def broken() -> bool:
        asked.set()
        raise RuntimeError("triton is gone")

    slow_down(model, monkeypatch)
    first, second = request(is_cancelled=broken), request()
    model.execute([first, second])
    assert asked.wait(PATIENCE)
    for one in (first, second):
        assert one.sender.ended.wait(PATIENCE)
        assert one.sender.responses[-1].error is None
    assert model._watcher.is_alive()
    assert "triton is gone" in capfd.readouterr().err


def test_without_a_thread_for_it_a_request_is_told_so_and_the_others_are_answered(model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch) -> None:
    start, refused = threading.Thread.start, []

    def start_but_one(thread: threading.Thread) -> None:
        if not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    first, second = request(), request()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_but_one)
        model.execute([first, second])
    for one in (first, second):
        assert one.sender.ended.wait(PATIENCE)
    assert "can't start new thread" in str(first.sender.responses[-1].error)
    assert second.sender.responses[-1].error is None
    assert model._live == set() or second.sender.ended.is_set()


def test_nothing_of_a_request_that_has_ended_is_kept(model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton waits with unloading a model for what its requests hold to be freed."""
    slow_down(model, monkeypatch)
    asked = threading.Event()

    def is_cancelled() -> bool:
        asked.set()
        return False

    one = request(is_cancelled=is_cancelled)
    sender = weakref.ref(one.sender)
    model.execute([one])
    assert one.sender.ended.wait(PATIENCE)
    assert asked.wait(PATIENCE)  # the watcher had it in its hands
    del one
    end = time.monotonic() + PATIENCE
    while sender() is not None and time.monotonic() < end:
        gc.collect()
        time.sleep(0.05)
    assert sender() is None
