"""The command line, ``run``: what it does when all is well, and one line with the right exit code when it is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from cli_support import PROMPT, refused
from click.testing import Result
from PIL import Image
from support import picture
from vflow.engines import Engine


def test_run_answers_on_stdout_and_reports_on_stderr(call: Callable[..., Result], engine: Engine, image: Path) -> None:
    result = call("run", engine.path, "--image", image, *PROMPT, "--max-new-tokens", 5)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.split()) <= 5
    for words in ("first token", "vision", "prefill", "visual tokens  30 → 15 (decoder 0) → 8 (decoder 2)", "KV cache", "allocated; visual part"):
        assert words in result.stderr


def test_run_json_has_the_promised_fields(call: Callable[..., Result], engine: Engine, image: Path) -> None:
    result = call("run", engine.path, "--image", image, "--image", image, *PROMPT, "--max-new-tokens", 4, "--json", "--threads", 1)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert set(values) == {
        "text", "token_ids", "finish_reason", "prompt_tokens", "new_tokens", "visual_tokens", "kv_bytes",
        "vision_s", "prefill_s", "ttft_s", "tokens_per_s",
    }  # fmt: skip
    assert values["visual_tokens"] == {
        "input": 60, "per_stage": [{"part": "decoder", "layer": 0, "kept": 30}, {"part": "decoder", "layer": 2, "kept": 15}]
    }  # fmt: skip
    per_token = 2 * 2 * 8 * 4
    visual = (2 * 32 + 2 * 16) * per_token  # two layers each of ⌈64 · 500/1024⌉ and ⌈64 · 250/1024⌉ tokens
    assert values["kv_bytes"] == {"allocated": visual + 4 * 64 * per_token, "visual": visual, "visual_unpruned": 4 * 64 * per_token}
    assert len(values["token_ids"]) == values["new_tokens"] <= 4
    assert 0 < values["vision_s"] + values["prefill_s"] <= values["ttft_s"]


def test_run_is_greedy_and_repeatable_and_samples_by_seed(call: Callable[..., Result], engine: Engine, image: Path) -> None:
    def answer(*options: Any) -> list[int]:
        tokens: list[int] = json.loads(call("run", engine.path, "--image", image, *PROMPT, "--json", "--max-new-tokens", 8, *options).stdout)[
            "token_ids"
        ]
        return tokens

    assert answer() == answer()
    hot = ["--temperature", 5.0, "--top-k", 40, "--top-p", 0.99, "--seed"]
    assert answer(*hot, 1) == answer(*hot, 1)
    assert len({tuple(answer(*hot, seed)) for seed in range(4)}) > 1


def test_run_takes_text_alone_and_a_picture_of_one_pixel(call: Callable[..., Result], engine: Engine, tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    result = call("run", engine.path, *PROMPT, "--max-new-tokens", 2, "--json")
    assert json.loads(result.stdout)["visual_tokens"]["input"] == 0
    result = call("run", engine.path, *PROMPT, "--image", tmp_path / "dot.png", "--max-new-tokens", 2, "--json")
    assert json.loads(result.stdout)["visual_tokens"]["input"] == 1  # scaled up to the checkpoint's least size


def test_max_pixels_scales_images_down(call: Callable[..., Result], engine: Engine, image: Path) -> None:
    result = call("run", engine.path, "--image", image, *PROMPT, "--json", "--max-new-tokens", 1, "--max-pixels", 64 * 12)
    assert json.loads(result.stdout)["visual_tokens"]["input"] <= 12


def write_images(folder: Path) -> None:
    (folder / "text.png").write_text("this is not a picture")
    (folder / "empty.jpg").write_bytes(b"")
    Image.fromarray(picture(8, 8)).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:2000])
    (folder / "folder.png").mkdir()
    Image.new("L", (1, 300)).save(folder / "strip.png")
    header = b"P4\n60000 60000\n"  # a bitmap that says it has 3.6 thousand million pixels
    (folder / "bomb.pbm").write_bytes(header + b"\0" * 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "none.png: no such file"),
        ("text.png", "text.png: not an image that Pillow can read"),
        ("empty.jpg", "empty.jpg: not an image that Pillow can read"),
        ("cut.png", "cut.png: damaged image"),
        ("folder.png", "folder.png: is a folder, not an image"),
        ("bomb.pbm", "larger than 89,478,485 pixels (a decompression bomb?)"),
        ("strip.png", "aspect ratio must be at most 200"),
    ],
)
def test_run_refuses_images_that_are_none(call: Callable[..., Result], engine: Engine, tmp_path: Path, name: str, message: str) -> None:
    write_images(tmp_path)
    refused(call("run", engine.path, "--image", tmp_path / name, *PROMPT), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "what " * 80], "prompt has 85 text tokens, the engine was built for 64"),
        (["--prompt", "what is <|image_pad|> ?"], "holds <|image_pad|>, which structures prompts"),
        ([*PROMPT, "--max-new-tokens", "1000"], "max_new_tokens 1000 is more than"),
        ([*PROMPT, "--seed", "-1"], "seed must be a whole number from 0"),
        ([*PROMPT, "--temperature", "nan"], "temperature must be a number"),
        ([*PROMPT, "--image", "{image}", "--image", "{image}", "--image", "{image}"], "max_visual_tokens 64 built, images have 90 together"),
        ([*PROMPT, "--image", "{image}", "--max-pixels", "3"], "max_pixels must be at least 64"),
    ],
)
def test_run_refuses_requests_that_do_not_fit(call: Callable[..., Result], engine: Engine, image: Path, options: list[str], message: str) -> None:
    result = call("run", engine.path, *(option.format(image=image) if "{image}" in option else option for option in options))
    refused(result, message)


@pytest.mark.parametrize("options", [[], [*PROMPT, "--max-new-tokens", "0"], [*PROMPT, "--top-p", "0"], [*PROMPT, "--provider", "npu"]])
def test_wrong_usage_of_run_is_exit_code_2(call: Callable[..., Result], engine: Engine, options: list[str]) -> None:
    assert call("run", engine.path, *options).exit_code == 2


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: (folder / "weights.bin").unlink(), "weights.bin: missing; build the engine again"),
    (lambda folder: flip_last_byte(folder / "weights.bin"), "weights.bin: damaged, its SHA-256 is not the one built"),
    (lambda folder: flip_last_byte(folder / "vision.onnx"), "vision.onnx: damaged"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json: has 2 bytes"),
    (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: missing, so this is not an engine directory"),
    (lambda folder: (folder / "manifest.json").write_text('{"format": 2}'), "format 2 is newer than the one that this vflow-export reads"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: not JSON"),
    (lambda folder: shutil.rmtree(folder), "no such engine directory"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_run_refuses_engines_that_are_not_as_built(call: Callable[..., Result], copy: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(copy)
    refused(call("run", copy, *PROMPT), message)


def test_run_refuses_an_old_onnx_runtime(call: Callable[..., Result], engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.0")
    refused(call("run", engine.path, *PROMPT), "onnxruntime 1.30.0 is too old: it may align causal attention differently")
