"""The trainer: what its batches say, and a checkpoint after three steps that Hugging Face and the exporter load."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from argparse import Namespace
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


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(TRAINER.parent)
    return importlib.import_module(TRAINER.stem)


def small_windowed(trainer: Any) -> Any:
    """A small Qwen2.5-VL whose parameters are all random: norms of one and biases of zero would hide what is left out."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "layers": 2, "heads": 2, "tower_size": 32, "tower_blocks": 4, "tower_heads": 2}
    config = trainer.model_config(Namespace(family="qwen2_5_vl", full_blocks=[1], **sizes))
    model = trainer.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kinds", "count,smell"], "unknown smell"),
        (["--seed", "1000000"], "held-out data"),
        (["--family", "qwen2_5_vl", "--full-blocks", "2,6"], "of the tower's 6 blocks"),
        (["--begin-at", "5", "--steps", "3"], "--steps does not follow"),
        (["--start", "a", "--resume", "b"], "not allowed with"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path: Path, options: list[str], message: str) -> None:
    done = run_trainer("--output", tmp_path / "model", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "model").exists()


@torch.no_grad()
@pytest.mark.parametrize(("rows", "columns"), [(6, 10), (4, 8), (3, 2)])
def test_batched_tower_is_that_of_hugging_face_where_windows_do_not_divide_the_grid(trainer: Any, rows: int, columns: int) -> None:
    model = small_windowed(trainer)
    pixels = torch.randn(2, 4 * rows * columns, 1176)
    batched = trainer.run_tower(model.model.visual, pixels, trainer.Ropes(model.config, [])(2 * rows, 2 * columns)[1])
    expected = model.model.visual(pixels.flatten(0, 1), torch.tensor([[1, 2 * rows, 2 * columns]] * 2)).pooler_output
    torch.testing.assert_close(batched.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)


def test_start_copies_what_matches_by_name_and_shape_and_leaves_the_rest(trainer: Any, tmp_path: Path) -> None:
    source = small_windowed(trainer)
    source.save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "layers": 3, "heads": 2, "tower_size": 48, "tower_blocks": 4, "tower_heads": 2}
    model = trainer.Qwen2VLForConditionalGeneration._from_config(trainer.model_config(Namespace(family="qwen2_vl", **sizes)), dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.copy_matching(model, tmp_path)
    copied = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    given = source.state_dict()
    assert all(torch.equal(model.state_dict()[name], given[name]) for name in copied)
    assert {name for name in given if "language_model" in name} < copied
    assert {name for name in copied if "visual" in name} == {"model.visual.merger.mlp.2.bias"}  # of the decoder's width, not of the tower's


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


@pytest.mark.slow
def test_three_steps_from_another_family_make_a_checkpoint_that_hugging_face_loads(tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = tmp_path / "model"
    start = TRAINER.parent.parent / "exporter" / "tiny" / "checkpoint"
    family = ["--family", "qwen2_5_vl", "--full-blocks", "1,3", "--start", start]
    done = run_trainer("--output", folder, "--steps", 3, "--kinds", "count,shape", "--threads", 1, *family, *SMALL)
    assert done.returncode == 0, done.stderr
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert (model.config.vision_config.fullatt_block_indexes, model.config.vision_config.window_size) == ([1, 3], 112)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert set(json.loads((folder / "accuracy.json").read_text())["accuracy"]["448"]) == {"all", "count", "shape"}
    assert json.loads((folder / "preprocessor_config.json").read_text())["processor_class"] == "Qwen2_5_VLProcessor"
