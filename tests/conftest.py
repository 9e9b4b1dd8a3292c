"""What all tests share: small checkpoints with random weights, and engines built from them once a session.

Weights are drawn so that attention is peaked and every bias and norm weight counts: a graph that forgets one differs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the network, whatever goes wrong
os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; read when the Triton language is first imported, by whichever test that is

import pytest
from hypothesis import settings
from support import MAX_TEXT_TOKENS, MAX_VISUAL_TOKENS, PATCH_SIZE

# The same examples every time: a red suite is to mean a change in the code. Search wider with --hypothesis-profile=wide.
settings.register_profile("suite", deadline=None, max_examples=40, derandomize=True)
settings.register_profile("wide", deadline=None, max_examples=1000)
settings.load_profile("suite")

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<unk>"]
WORDS = [
    "user",
    "assistant",
    "system",
    "?",
    ".",
    ",",
    "what",
    "shape",
    "color",
    "is",
    "the",
    "object",
    "objects",
    "how",
    "many",
    "are",
    "there",
    "a",
    "left",
    "right",
    "of",
    "or",
    "above",
    "below",
    "list",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %} <|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
CONFIG: dict[str, Any] = {
    "text_config": {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "vision_config": {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH_SIZE},
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
    "tie_word_embeddings": True,
}


# Windows of 2 × 2 visual tokens; blocks 1 and 3 look at the whole image.
WINDOWED_TOWER: dict[str, Any] = {
    "depth": 4, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 44, "patch_size": PATCH_SIZE,
    "window_size": 4 * PATCH_SIZE, "fullatt_block_indexes": [1, 3],
}  # fmt: skip


# Blocks 0 and 2 give features to the first two decoder layers; positions are learned on a grid of 5 × 5 patches.
DEEPSTACK_TOWER: dict[str, Any] = {
    "depth": 4, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 44, "patch_size": PATCH_SIZE,
    "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2],
}  # fmt: skip
INTERLEAVED_ROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 3, 1], "mrope_interleaved": True}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen2_vl": {},
    "qwen2_5_vl": {"vision_config": WINDOWED_TOWER},
    "qwen3_vl": {
        "vision_config": DEEPSTACK_TOWER,  # heads wider together than the hidden size
        "text_config": {**CONFIG["text_config"], "head_dim": 16, "rope_parameters": INTERLEAVED_ROPE},
    },
}


def random_model(seed: int, *, tied: bool = True, family: str = "qwen2_vl") -> Any:
    """A small Hugging Face model of a family with random weights."""
    import torch
    from vflow.exporter.models import FAMILIES

    torch.set_num_threads(1)  # quicker than two at this size
    kind = FAMILIES[family]
    model = kind.model._from_config(kind.config(**{**CONFIG, "tie_word_embeddings": tied, **OF_FAMILY[family]}), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.2 * noise + (1.0 if "norm" in name or "ln_q" in name else 0.0) * name.endswith("weight"))
            else:
                parameter.copy_(noise * (1.5 if "q" in name.split(".")[-2] else 1.0) / parameter[0].numel() ** 0.5)
    model.tie_weights()
    return model.eval()


def write_text_files(folder: Path) -> None:
    """Tokenizer, chat template and processor, as a Hugging Face checkpoint has them."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(SPECIAL_TOKENS + WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[?.,]"), "isolated")])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    processor = {"patch_size": PATCH_SIZE, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 64, "max_pixels": 64 * 8 * 8}
    statistics = {"image_mean": [0.5, 0.4, 0.45], "image_std": [0.25, 0.3, 0.27]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | statistics))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))


def save_checkpoint(model: Any, folder: Path, **options: Any) -> Path:
    """Weights and text files into ``folder``; ``options`` of ``save_pretrained``."""
    model.save_pretrained(folder, **options)
    write_text_files(folder)
    return folder


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in fp32: 3 tower blocks, 4 decoder layers, head tied to the embedding. Tests must not change it."""
    folder = tmp_path_factory.mktemp("model") / "random"
    return save_checkpoint(random_model(1), folder)


@pytest.fixture(scope="session")
def windowed_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL of the same decoder: 4 tower blocks, of which two look at windows. Tests must not change it."""
    folder = tmp_path_factory.mktemp("model") / "windowed"
    return save_checkpoint(random_model(1, family="qwen2_5_vl"), folder)


@pytest.fixture(scope="session")
def deepstack_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL of 4 tower blocks and 4 decoder layers. Tests must not change it."""
    folder = tmp_path_factory.mktemp("model") / "deepstack"
    return save_checkpoint(random_model(1, family="qwen3_vl"), folder)


@pytest.fixture(scope="session")
def untied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sizes with a head of its own, in several weights files with an index."""
    folder = tmp_path_factory.mktemp("model") / "untied"
    return save_checkpoint(random_model(2, tied=False), folder, max_shard_size="100KB")


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``build(checkpoint folder, schedule, precision="fp32")``: the engine, built once a session for equal arguments."""
    from vflow.exporter.build import BuildOptions, build_engine
    from vflow.exporter.checkpoint import open_checkpoint

    built: dict[str, Any] = {}

    def make(folder: Path, schedule: Any, precision: str = "fp32") -> Any:
        key = json.dumps([str(folder), schedule.to_dict(), precision])
        if key not in built:
            output = tmp_path_factory.mktemp("engine") / "engine"
            options = BuildOptions(precision, MAX_VISUAL_TOKENS, MAX_TEXT_TOKENS)
            built[key] = build_engine(open_checkpoint(str(folder)), schedule, output, options)
        return built[key]

    return make
