"""The commands in this process, an engine and a picture for them."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from support import DECODER_STAGES, HANDLED_SIGNALS, picture
from vflow.engines import Engine
from vflow.exporter.cli import main


@pytest.fixture
def call() -> Iterator[Callable[..., Result]]:
    """``call("run", …)``: the command in this process."""
    handlers = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    yield lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def engine(build: Callable[..., Engine], random_checkpoint: Path) -> Engine:
    return build(random_checkpoint, DECODER_STAGES)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(picture(6, 5)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def copy(engine: Engine, tmp_path: Path) -> Path:
    """An engine that the test may damage."""
    return Path(shutil.copytree(engine.path, tmp_path / "engine"))
