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


def small(trainer: Any, family: str) -> Any:
    """A small model whose parameters are all random: norms of one and biases of zero would hide what is left out."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "layers": 3, "heads": 2, "tower_size": 32, "tower_blocks": 4, "tower_heads": 2}
    config = trainer.model_config(Namespace(family=family, full_blocks=[1], deepstack_blocks=[0, 2], **sizes))
    model = trainer.FAMILIES[family].model._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def generated(trainer: Any, model: Any, item: Any) -> str:
    """Hugging Face's greedy answer to a question."""
    words = trainer.vocabulary()
    height, width = (side // 14 for side in item.image.shape[:2])
    pads = ["<|image_pad|>"] * (height * width // 4)
    prompt = ["<|im_start|>", "user", "<|vision_start|>", *pads, "<|vision_end|>", *item.question.prompt.split()]
    ids = torch.tensor([[words.index(word) for word in [*prompt, "<|im_end|>", "<|im_start|>", "assistant"]]])
    pixels = torch.from_numpy(trainer.preprocess_image(item.image, trainer.ImageProcessorConfig()).pixel_values)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        image_grid_thw=torch.tensor([[1, height, width]]),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        max_new_tokens=trainer.BRANCH["list"],
        do_sample=False,
        eos_token_id=words.index("<|im_end|>"),
        pad_token_id=0,
    )
    return " ".join(words[token] for token in out[0, ids.shape[1] :] if words[token] != "<|im_end|>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kinds", "count,smell"], "unknown smell"),
        (["--seed", "1000000"], "held-out data"),
        (["--family", "qwen2_5_vl", "--full-blocks", "2,6"], "of the tower's 6 blocks"),
        (["--family", "qwen3_vl", "--deepstack-blocks", "3,1"], "deepstack_visual_indexes must be blocks of the tower, 0..5, ascending"),
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
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(("rows", "columns"), [(6, 10), (4, 8), (3, 2), (12, 9)])
def test_batched_tower_is_that_of_hugging_face_where_windows_do_not_divide_the_grid(trainer: Any, family: str, rows: int, columns: int) -> None:
    model = small(trainer, family)
    pixels = torch.randn(2, 4 * rows * columns, 1176)
    batched = trainer.run_tower(model.model.visual, pixels, trainer.Ropes(model.config, [])(2 * rows, 2 * columns)[1])
    output = model.model.visual(pixels.flatten(0, 1), torch.tensor([[1, 2 * rows, 2 * columns]] * 2))
    expected = [output.pooler_output, *getattr(output, "deepstack_features", ())]
    assert len(batched) == len(expected) == (3 if family == "qwen3_vl" else 1)
    for ours, theirs in zip(batched, expected, strict=True):
        torch.testing.assert_close(ours.flatten(0, 1), theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_loss_of_a_batch_is_that_of_logits_from_hugging_face(trainer: Any, family: str) -> None:
    model, rows, columns, length = small(trainer, family), 3, 5, 6
    count, vocabulary = rows * columns, trainer.vocabulary()
    pixels, tokens = torch.randn(2, 4 * count, 1176), torch.randint(8, len(vocabulary), (2, 4 + length))
    tokens[:, :4] = torch.tensor([vocabulary.index(word) for word in ("<|im_start|>", "user", "<|vision_start|>", "<|vision_end|>")])
    grid_xy, grid, rope, mask = trainer.Ropes(model.config, [length])(2 * rows, 2 * columns)
    nothing = torch.zeros(2, count, dtype=torch.long)
    losses = trainer.Trainee(model)(pixels, tokens, tokens, nothing, nothing, nothing.float(), grid_xy, grid, rope, mask)

    image = torch.full((2, count), model.config.image_token_id)
    ids = torch.cat([tokens[:, :3], image, tokens[:, 3:]], 1)
    grids = torch.tensor([[1, 2 * rows, 2 * columns]] * 2)
    logits = model(ids, pixel_values=pixels.flatten(0, 1), image_grid_thw=grids, mm_token_type_ids=(ids == image[0, 0]).int()).logits
    logits = torch.cat([logits[:, :3], logits[:, 3 + count :]], 1)
    torch.testing.assert_close(losses["answer"], torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_answers_are_what_hugging_face_generates(trainer: Any, family: str) -> None:
    model = small(trainer, family).eval()
    items = list(trainer.samples(seed=trainer.HELD_OUT_SEED, count=4, kinds=["shape", "count"], width=140, height=84))
    assert trainer.answers(model, items) == [generated(trainer, model, item) for item in items]


def test_start_copies_what_matches_by_name_and_shape_and_leaves_the_rest(trainer: Any, tmp_path: Path) -> None:
    source = small(trainer, "qwen2_5_vl")
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


def test_start_knows_the_towers_of_other_families_by_their_own_names(trainer: Any, tmp_path: Path) -> None:
    source, model = small(trainer, "qwen2_vl"), small(trainer, "qwen3_vl")
    source.save_pretrained(tmp_path)
    trainer.copy_matching(model, tmp_path)
    theirs, ours = source.model.visual, model.model.visual
    for block, given in zip(ours.blocks, theirs.blocks, strict=True):
        assert torch.equal(block.mlp.linear_fc1.weight, given.mlp.fc1.weight) and torch.equal(block.mlp.linear_fc2.bias, given.mlp.fc2.bias)
    assert torch.equal(ours.merger.norm.bias, theirs.merger.ln_q.bias)
    assert torch.equal(ours.merger.linear_fc1.weight, theirs.merger.mlp[0].weight) and torch.equal(
        ours.merger.linear_fc2.bias, theirs.merger.mlp[2].bias
    )


@torch.no_grad()
def test_what_deepstack_adds_begins_as_nothing(trainer: Any) -> None:
    model = small(trainer, "qwen3_vl")
    trainer.prepare(model)
    tokens, *deepstack = trainer.run_tower(model.model.visual, torch.randn(1, 16, 1176), trainer.Ropes(model.config, [])(4, 4)[1])
    assert tokens.any() and len(deepstack) == 2
    assert not any(added.any() for added in deepstack)


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
@pytest.mark.parametrize(
    ("family", "option", "name", "processor"),
    [
        ("qwen2_5_vl", "--full-blocks", "fullatt_block_indexes", "Qwen2_5_VLProcessor"),
        ("qwen3_vl", "--deepstack-blocks", "deepstack_visual_indexes", "Qwen3VLProcessor"),
    ],
)
def test_three_steps_from_another_family_make_a_checkpoint_that_hugging_face_loads(
    tmp_path: Path, family: str, option: str, name: str, processor: str
) -> None:
    from transformers import AutoModelForImageTextToText

    folder = tmp_path / "model"
    start = TRAINER.parent.parent / "exporter" / "tiny" / "checkpoint"
    done = run_trainer(
        "--output", folder, "--steps", 3, "--kinds", "count,shape", "--threads", 1, "--family", family, option, "1,3", "--start", start, *SMALL
    )
    assert done.returncode == 0, done.stderr
    assert open_checkpoint(str(folder)).config.model_type == family
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert (getattr(model.config.vision_config, name), getattr(model.config.vision_config, "window_size", 112)) == ([1, 3], 112)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert set(json.loads((folder / "accuracy.json").read_text())["accuracy"]["448"]) == {"all", "count", "shape"}
    assert json.loads((folder / "preprocessor_config.json").read_text())["processor_class"] == processor
