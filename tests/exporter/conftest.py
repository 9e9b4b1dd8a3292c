"""Schedules in turn, and models as PyTorch modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from schedules import SCHEDULES
from vflow.exporter.checkpoint import open_checkpoint
from vflow.exporter.model import load_model
from vflow.exporter.schedule import Schedule


@pytest.fixture(params=list(SCHEDULES))
def schedule(request: pytest.FixtureRequest) -> Schedule:
    """Each schedule in turn."""
    return SCHEDULES[request.param]


@pytest.fixture(scope="session")
def model(random_checkpoint: Path) -> Any:
    """The random checkpoint, loaded for the reference in fp32."""
    return load_model(open_checkpoint(str(random_checkpoint)), torch.float32)


@pytest.fixture(scope="session")
def windowed_model(windowed_checkpoint: Path) -> Any:
    return load_model(open_checkpoint(str(windowed_checkpoint)), torch.float32)


@pytest.fixture(scope="session")
def deepstack_model(deepstack_checkpoint: Path) -> Any:
    return load_model(open_checkpoint(str(deepstack_checkpoint)), torch.float32)


@pytest.fixture(scope="session")
def untied_model(untied_checkpoint: Path) -> Any:
    return load_model(open_checkpoint(str(untied_checkpoint)), torch.float32)
