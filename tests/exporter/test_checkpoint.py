"""Checkpoints: what is refused and how it is said, names of either transformers, fingerprints, and loading without a difference."""

from __future__ import annotations

import json
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration
from vflow.exporter.build import BuildOptions, build_engine
from vflow.exporter.checkpoint import CheckpointError, TensorReader, _read_config, open_checkpoint, resolve_model
from vflow.exporter.model import load_model
from vflow.exporter.models import image_token_ids, model_shape
from vflow.exporter.schedule import unpruned_schedule
from vflow.exporter.shape import DecoderShape, ModelShape, TowerShape

WEIGHTS = "model.safetensors"
OPTIONS = BuildOptions(max_visual_tokens=64, max_text_tokens=64)


@pytest.fixture
def copy(random_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may damage."""
    return Path(shutil.copytree(random_checkpoint, tmp_path / "model"))


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def refused(model: Path | str, message: str) -> str:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model", ["gpt-5", "./no/such/folder", "a/b/c", "../x", "owner/name/", "", "qwen2-vl-3b"])
def test_unknown_names_are_refused_with_the_aliases(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    unknown = r"no such folder, and not a hub id \(owner/name\) or an alias \(tiny, tiny-2\.5, tiny-3, qwen2-vl"
    refused(model, unknown if model else "config.json|no such folder")


@pytest.mark.parametrize("typed", [".", "../random", "random"])
def test_a_folder_is_found_again_from_elsewhere(random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    """An engine keeps this name, and ``verify`` asks for it."""
    monkeypatch.chdir(random_checkpoint.parent if typed == "random" else random_checkpoint)
    name = open_checkpoint(typed).name
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(name).path.samefile(random_checkpoint)
    assert Path(name).name == "random"
    assert open_checkpoint("tiny").name == "tiny"
    assert open_checkpoint("tiny-2.5").config.model_type == "qwen2_5_vl"
    assert open_checkpoint("tiny-3").config.model_type == "qwen3_vl"


def test_a_tensor_that_is_in_two_files_is_refused(untied_checkpoint: Path, tmp_path: Path) -> None:
    """Which of them the index means is not looked at: another program may take the other."""
    folder = shutil.copytree(untied_checkpoint, tmp_path / "twice")
    first, *_, last = sorted(folder.glob("*.safetensors"))
    with safe_open(first, "pt") as file:
        name = next(iter(file.keys()))
        tensor = file.get_tensor(name)
    save_file({**load_file(last), name: tensor}, last)
    refused(folder, rf"{re.escape(name)} is in .*{first.name} and in .*{last.name}: remove the one")


def test_a_file_is_refused_as_a_model(random_checkpoint: Path) -> None:
    refused(random_checkpoint / WEIGHTS, "is a file; give the folder that holds config.json")


def test_without_network_and_cache_one_line_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("not cached\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    began = time.monotonic()
    refused("qwen2-vl", r"Qwen/Qwen2-VL-2B-Instruct is not in the local cache and the hub cannot be reached; connect, or download it elsewhere")
    assert time.monotonic() - began < 2


def test_a_model_that_the_hub_does_not_have_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, local_files_only: bool = False, **__: Any) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        raise RepositoryNotFoundError("404", response=type("Response", (), {"headers": {}, "request": None, "status_code": 404})())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    refused("owner/name", "the hub has no model owner/name")


def test_a_cached_model_is_taken_without_asking_the_hub(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def cached(repository: str, **options: Any) -> str:
        calls.append((repository, options.get("local_files_only")))
        return str(random_checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert resolve_model("qwen2-vl-7b") == random_checkpoint
    assert calls == [("Qwen/Qwen2-VL-7B-Instruct", True)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"model_type": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        (b"[]", r"model_type None is not supported \(supported: qwen2_vl, qwen2_5_vl, qwen3_vl\)"),
        (b'{"model_type": "llava"}', r"model_type 'llava' is not supported \(supported: qwen2_vl, qwen2_5_vl, qwen3_vl\)"),
        (b'{"model_type": ["qwen2_vl"]}', "is not supported"),
        (b'{"model_type": "qwen2_vl", "text_config": "small"}', "not a valid Qwen2-VL configuration"),
        (b'{"model_type": "qwen2_vl", "vision_config": {"depth": "four"}}', "not a valid Qwen2-VL configuration"),
        (b'{"model_type": "qwen2_5_vl", "vision_config": {"depth": "four"}}', "not a valid Qwen2.5-VL configuration"),
    ],
)
def test_configurations_that_cannot_be_used_are_refused_by_file(copy: Path, content: bytes, message: str) -> None:
    (copy / "config.json").write_bytes(content)
    assert str(copy / "config.json") in refused(copy, message)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("text_config", {"num_attention_heads": 0}),
        ("text_config", {"num_attention_heads": 5}),
        ("text_config", {"num_key_value_heads": 3}),
        ("text_config", {"hidden_size": -32}),
        ("vision_config", {"num_heads": 0}),
        ("vision_config", {"depth": 0}),
        ("text_config", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        ("text_config", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 1, 1]}}),
    ],
)
def test_impossible_sizes_are_refused_by_file(copy: Path, part: str, change: dict[str, Any]) -> None:
    edit_json(copy / "config.json", lambda values: values[part].update(change))
    assert str(copy / "config.json") in refused(copy, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "x"}, "text_config.hidden_act 'x' is unknown to transformers"),
        ({"rms_norm_eps": -1.0}, "text_config.rms_norm_eps must be a number of at least 0"),
        ({"dtype": []}, "not a valid Qwen2-VL configuration"),
        *(
            ({"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": [2, 1, 1]}}, "rope_theta must be a positive number")
            for theta in (None, "x", 0, -1, [], True)
        ),
        *(
            ({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": sections}}, "must be three whole numbers that sum")
            for sections in (None, ["a", 1, 1], [5, -2, 1], [2.0, 1, 1], [2, 2])
        ),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "use_sliding_window is not supported"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0, "mrope_section": [2, 1, 1]}},
            "rope_type 'yarn' is not supported",
        ),
    ],
)
def test_variants_that_the_graphs_do_not_compute_are_refused(copy: Path, change: dict[str, Any], message: str) -> None:
    edit_json(copy / "config.json", lambda values: values["text_config"].update(change))
    refused(copy, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_token_id": -1}, r"image_token_id must be a token, 0\.\.47"),
        ({"vision_end_token_id": 48}, r"vision_end_token_id must be a token, 0\.\.47"),
        ({"dtype": [1]}, "not a valid Qwen2-VL configuration"),
    ],
)
def test_values_at_the_top_that_cannot_be_are_refused(copy: Path, change: dict[str, Any], message: str) -> None:
    edit_json(copy / "config.json", lambda values: values.update(change))
    refused(copy, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": 7}, "vision_config.window_size must be at least 8 pixels, one visual token"),
        ({"fullatt_block_indexes": [1, 4]}, r"vision_config.fullatt_block_indexes must be blocks of the tower, 0\.\.3"),
        ({"fullatt_block_indexes": [-1]}, r"vision_config.fullatt_block_indexes must be blocks of the tower, 0\.\.3"),
        ({"out_hidden_size": 64}, "vision_config.out_hidden_size must be text_config.hidden_size"),
        ({"num_heads": 16}, "vision_config.num_heads must divide hidden_size into heads whose width is a multiple of 4"),
        ({"intermediate_size": 0}, "vision_config.intermediate_size must be at least 1"),
        ({"patch_size": [4, 4]}, "vision_config.patch_size must be at least 1"),
        ({"depth": 10**9}, r"vision_config.depth is 1000000000, the weights have \d+ tensors"),
    ],
)
def test_towers_with_windows_that_cannot_be_are_refused(windowed_checkpoint: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = shutil.copytree(windowed_checkpoint, tmp_path / "model")
    edit_json(folder / "config.json", lambda values: values["vision_config"].update(change))
    refused(folder, message)


# config.json of Qwen/Qwen2-VL-2B-Instruct, as written by transformers 4: sizes of the decoder at the top, rope under its old name.
PUBLISHED = {
    "model_type": "qwen2_vl", "hidden_act": "silu", "hidden_size": 1536, "intermediate_size": 8960, "max_position_embeddings": 32768,
    "max_window_layers": 28, "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "sliding_window": 32768, "vocab_size": 151936,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False, "bos_token_id": 151643, "eos_token_id": 151645,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653, "image_token_id": 151655, "video_token_id": 151656,
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 1536, "patch_size": 14,
        "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
    },
}  # fmt: skip


def test_the_published_configuration_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = _read_config(tmp_path)
    assert model_shape(config) == ModelShape(TowerShape(32, 1280, 16, 5120, 1176, 2), DecoderShape(28, 1536, 12, 2, 128, 8960, 151_936))
    assert image_token_ids(config) == {"image": 151655, "vision_start": 151652, "vision_end": 151653}
    assert (config.text_config.rope_parameters["rope_theta"], config.tie_word_embeddings) == (1000000.0, True)


# config.json of Qwen/Qwen2.5-VL-3B-Instruct, likewise.
PUBLISHED_2_5 = {
    **PUBLISHED, "model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 128000,
    "max_window_layers": 70, "num_attention_heads": 16, "num_hidden_layers": 36,
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
        "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip


def test_the_published_configuration_of_qwen2_5_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_2_5))
    config = _read_config(tmp_path)
    tower = TowerShape(32, 1280, 16, 3420, 1176, 2, mlp_matrices=3, window=4, full_blocks=(7, 15, 23, 31))
    assert model_shape(config) == ModelShape(tower, DecoderShape(36, 2048, 16, 2, 128, 11008, 151_936))


# config.json of Qwen/Qwen3-VL-4B-Instruct, as written by transformers 4.57: heads wider together than the hidden size.
PUBLISHED_3 = {
    "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655, "video_token_id": 151656,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653, "tie_word_embeddings": True,
    "text_config": {
        "attention_bias": False, "bos_token_id": 151643, "dtype": "bfloat16", "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 262144, "model_type": "qwen3_vl_text",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}, "rope_theta": 5000000,
        "tie_word_embeddings": True, "vocab_size": 151936,
    },
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1024, "in_channels": 3,
        "intermediate_size": 4096, "model_type": "qwen3_vl", "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2560,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip


def test_the_published_configuration_of_qwen3_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_3))
    config = _read_config(tmp_path)
    tower = TowerShape(24, 1024, 16, 4096, 1536, 2, deepstack_blocks=(5, 11, 17))
    assert model_shape(config) == ModelShape(tower, DecoderShape(36, 2560, 32, 8, 128, 9728, 151_936))
    assert model_shape(config).visual_width == 4 * 2560
    assert (config.text_config.rope_parameters["rope_theta"], config.tie_word_embeddings) == (5000000, True)


def test_only_models_that_have_it_read_a_width_of_heads(copy: Path, deepstack_checkpoint: Path) -> None:
    edit_json(copy / "config.json", lambda values: values["text_config"].update(head_dim=2))
    assert model_shape(open_checkpoint(str(copy)).config).decoder.head_dim == 8
    assert model_shape(open_checkpoint(str(deepstack_checkpoint)).config).decoder.head_dim == 16


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_config", {"deepstack_visual_indexes": [0, 4]}, r"vision_config.deepstack_visual_indexes must be blocks of the tower, 0\.\.3"),
        ("vision_config", {"deepstack_visual_indexes": [2, 0]}, r"deepstack_visual_indexes must be blocks of the tower, 0\.\.3, ascending"),
        ("vision_config", {"deepstack_visual_indexes": [0, 0]}, r"deepstack_visual_indexes must be blocks of the tower, 0\.\.3, ascending"),
        ("vision_config", {"num_position_embeddings": 24}, "vision_config.num_position_embeddings must be a square"),
        ("vision_config", {"out_hidden_size": 64}, "vision_config.out_hidden_size must be text_config.hidden_size"),
        ("text_config", {"num_hidden_layers": 10**9}, r"text_config.num_hidden_layers is 1000000000, the weights have \d+ tensors"),
        ("text_config", {"num_hidden_layers": 1}, "deepstack_visual_indexes must be no more than text_config.num_hidden_layers"),
        ("text_config", {"head_dim": 15}, "text_config.head_dim must be even, and num_attention_heads a multiple of num_key_value_heads"),
        ("text_config", {"num_key_value_heads": 3}, "text_config.head_dim must be even, and num_attention_heads a multiple of num_key_value_heads"),
        ("text_config", {"head_dim": 0}, "text_config.head_dim must be at least 1"),
        ("text_config", {"head_dim": 20}, "mrope_section must be three whole numbers that sum to half of the width of a head"),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 2, 2], "mrope_interleaved": False}},
            "text_config.rope_parameters.mrope_interleaved must be true, as Qwen3-VL is computed",
        ),
    ],
)
def test_models_with_deepstack_that_cannot_be_are_refused(
    deepstack_checkpoint: Path, tmp_path: Path, part: str, change: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(deepstack_checkpoint, tmp_path / "model")
    edit_json(folder / "config.json", lambda values: values[part].update(change))
    refused(folder, message)


def test_a_folder_without_configuration_or_weights_is_refused(tmp_path: Path, copy: Path) -> None:
    refused(tmp_path, "config.json: missing; give the folder of a Hugging Face checkpoint")
    (copy / WEIGHTS).unlink()
    refused(copy, r"no \*\.safetensors weights")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pth", "model.pt", "last.ckpt"])
def test_pickled_weights_are_refused_and_never_opened(copy: Path, name: str) -> None:
    (copy / WEIGHTS).unlink()
    (copy / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    refused(copy, f"{name}: pickled weights can run code when loaded and are refused; convert them to safetensors")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.3, 0.99, -1])
def test_truncated_weights_are_refused_at_any_length(copy: Path, keep: float) -> None:
    data = (copy / WEIGHTS).read_bytes()
    length = keep if isinstance(keep, int) else int(len(data) * keep)
    (copy / WEIGHTS).write_bytes(data[:length])
    refused(copy, f"{WEIGHTS}: damaged or truncated safetensors; download it again")


def test_weights_that_are_too_long_are_refused(copy: Path) -> None:
    with (copy / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    refused(copy, "damaged or truncated safetensors")


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all", b"[]", b"3", b'{"x": 3}', b'{"x": {}}', b"[" * 100_000, b'{"x": ' + b"9" * 5000 + b"}",
        json.dumps({"x": ENTRY | {"shape": "a"}}).encode(), json.dumps({"x": ENTRY | {"shape": [-1]}}).encode(),
        json.dumps({"x": ENTRY | {"shape": [1.0]}}).encode(), json.dumps({"x": ENTRY | {"data_offsets": [4]}}).encode(),
        json.dumps({"x": ENTRY | {"data_offsets": ["0", "4"]}}).encode(), json.dumps({"x": ENTRY | {"dtype": "F4"}}).encode(),
        json.dumps({"x": ENTRY | {"dtype": ["F32"]}}).encode(), json.dumps({"x": ENTRY | {"data_offsets": [-4, 0]}, "y": ENTRY}).encode(),
        json.dumps({"x": {"dtype": "F4", "shape": [0], "data_offsets": [4, 4]}, "y": ENTRY}).encode(),
    ],
)  # fmt: skip
def test_headers_full_of_garbage_are_refused_by_file(copy: Path, header: bytes) -> None:
    (copy / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert str(copy / WEIGHTS) in refused(copy, "damaged")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model-9.safetensors"}, r"model-9.safetensors is missing \(1 of 1 weights files\); download the rest"),
        ({"a": "../other/model.safetensors"}, "names a file outside the folder"),
        ({"a": "/etc/passwd"}, "names a file outside the folder"),
        ({"a": ".."}, "names a file outside the folder|is missing"),
        ({"a": 5}, "not a safetensors index"),
        (["model.safetensors"], "not a safetensors index"),
        ({"a": ["model.safetensors"]}, "not a safetensors index"),
    ],
)
def test_indexes_that_lead_nowhere_are_refused(copy: Path, weight_map: Any, message: str) -> None:
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(copy, message)


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 100_000, b"{}", b"\xff"])
def test_an_index_that_is_none_is_refused(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors.index.json").write_bytes(content)
    refused(copy, "not a safetensors index; download it again")


def save_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def test_a_missing_tensor_is_named_and_nothing_is_left_behind(copy: Path, tmp_path: Path) -> None:
    save_tensors(copy, lambda tensors: tensors.pop(next(name for name in tensors if name.endswith("layers.2.mlp.up_proj.weight"))))
    checkpoint = open_checkpoint(str(copy))
    with pytest.raises(CheckpointError, match=r"lack language_model\.layers\.2\.mlp\.up_proj\.weight; the checkpoint is incomplete"):
        build_engine(checkpoint, unpruned_schedule(), tmp_path / "out" / "engine", OPTIONS)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(CheckpointError, match=r"lack language_model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(checkpoint, torch.float32)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(copy: Path) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
        tensors[name] = tensors[name][:, :-1]

    save_tensors(copy, shorten)
    checkpoint = open_checkpoint(str(copy))
    refusal = r"layers\.1\.mlp\.down_proj\.weight is \[32, 47\], config\.json asks for \[32, 48\]"
    with pytest.raises(CheckpointError, match=refusal):
        build_engine(checkpoint, unpruned_schedule(), copy / "engine", OPTIONS)
    with pytest.raises(CheckpointError, match=refusal):
        load_model(checkpoint, torch.float32)


def test_a_fingerprint_changes_with_a_single_weight_and_not_with_the_folder(random_checkpoint: Path, copy: Path) -> None:
    original = open_checkpoint(str(random_checkpoint)).fingerprint
    assert len(original) == 16
    assert open_checkpoint(str(copy)).fingerprint == original
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (copy / WEIGHTS).write_bytes(data)
    assert open_checkpoint(str(copy)).fingerprint != original


def as_transformers_4(name: str) -> str:
    """The names in the published Qwen2-VL checkpoints."""
    return name.removeprefix("model.") if name.startswith("model.visual.") else name.replace("model.language_model.", "model.")


def as_transformers_5(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return name if name.startswith(("model.visual.", "model.language_model.", "lm_head.")) else name.replace("model.", "model.language_model.", 1)


@pytest.mark.parametrize("spelling", [as_transformers_4, as_transformers_5])
def test_names_of_either_transformers_are_read_as_the_same_model(copy: Path, random_checkpoint: Path, spelling: Callable[[str], str]) -> None:
    tensors = load_file(copy / WEIGHTS)
    save_file({spelling(name): tensor for name, tensor in tensors.items()}, copy / WEIGHTS, {"format": "pt"})
    renamed, original = open_checkpoint(str(copy)), open_checkpoint(str(random_checkpoint))
    assert set(renamed.tensors) == set(original.tensors)
    assert {name.split(".")[0] for name in renamed.tensors} == {"visual", "language_model"}
    with TensorReader(renamed) as ours, TensorReader(original) as theirs:
        for name in original.tensors:
            assert torch.equal(ours.read(name), theirs.read(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["random_checkpoint", "untied_checkpoint"])
def test_a_loaded_model_is_hugging_face_s_own(request: pytest.FixtureRequest, kind: str, dtype: torch.dtype) -> None:
    folder = request.getfixturevalue(kind)
    ours = load_model(open_checkpoint(str(folder)), dtype)
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    expected = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(expected)
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, expected[name]), name
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert (ours.lm_head.weight is ours.model.language_model.embed_tokens.weight) == (kind == "random_checkpoint")


def test_size_is_that_of_all_tensors(random_checkpoint: Path) -> None:
    tensors = load_file(random_checkpoint / WEIGHTS)
    assert open_checkpoint(str(random_checkpoint)).size == sum(np.prod(t.shape) * 4 for t in tensors.values())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json: missing; save the tokenizer in its fast form"),
        ("preprocessor_config.json", None, "preprocessor_config.json: missing; it says how images are scaled"),
        ("preprocessor_config.json", "{", "preprocessor_config.json: not readable as JSON"),
        ("preprocessor_config.json", "[]", "must hold a JSON object"),
        ("preprocessor_config.json", '{"patch_size": "x"}', "preprocessor_config.json"),
        ("preprocessor_config.json", '{"image_std": 5}', "preprocessor_config.json"),
        ("preprocessor_config.json", '{"size": 5}', "preprocessor_config.json"),
        ("preprocessor_config.json", '{"patch_size": 14}', "preprocessor_config.json"),
        ("generation_config.json", "{", "generation_config.json: not readable as JSON"),
        ("generation_config.json", '{"eos_token_id": "end"}', "generation_config.json"),
        ("chat_template.jinja", None, "no chat template"),
    ],
)
def test_text_files_that_cannot_be_used_are_refused_and_nothing_is_left(
    copy: Path, tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    (copy / file).unlink() if content is None else (copy / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        build_engine(open_checkpoint(str(copy)), unpruned_schedule(), tmp_path / "out" / "engine", OPTIONS)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_the_chat_template_is_found_where_older_checkpoints_keep_it(copy: Path) -> None:
    from vflow.exporter.build import _chat_template

    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert _chat_template(copy) == template
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": template + " "}))
    assert _chat_template(copy) == template + " "
