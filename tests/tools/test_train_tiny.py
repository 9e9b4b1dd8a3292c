"""The trainer: what its batches say, and a checkpoint after three steps that Hugging Face and the exporter load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vflow.exporter.checkpoint import open_checkpoint

TRAINER = Path(__file__).parent.parent.parent / "tools" / "train_tiny.py"
SMALL = [
    "--hidden-size",
    "32",
    "--layers",
    "6",
    "--heads",
    "2",
    "--tower-size",
    "32",
    "--tower-blocks",
    "4",
    "--tower-heads",
    "2",
    "--questions",
    "2",
]


def run_trainer(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TRAINER), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize(("options", "message"), [(["--kinds", "count,smell"], "unknown smell"), (["--seed", "1000000"], "held-out data")])
def test_wrong_options_are_refused_before_anything_is_written(tmp_path: Path, options: list[str], message: str) -> None:
    done = run_trainer("--output", tmp_path / "model", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_three_steps_make_a_checkpoint_that_both_sides_load(tmp_path: Path) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    folder = tmp_path / "model"
    done = run_trainer("--output", folder, "--steps", 3, "--kinds", "count,shape", "--threads", 1, *SMALL)
    assert done.returncode == 0, done.stderr
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.config.text_config.num_hidden_layers, checkpoint.config.vision_config.depth) == (6, 4)
    model, info = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    report = json.loads((folder / "accuracy.json").read_text())
    assert report["steps"] == 3
    assert set(report["accuracy"]["448"]) == {"all", "count", "shape"}
