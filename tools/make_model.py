"""Make a checkpoint of a published shape with random weights, to measure sizes and times without a download.

    python tools/make_model.py --shape 2b --output out/model-2b

Weights are fp16 safetensors, written one shard at a time; tokenizer and processor are the small model's. With ``--device cuda`` the numbers are other
ones and drawn in a moment.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vflow.exporter.checkpoint import open_checkpoint, resolve_model
from vflow.exporter.models import QWEN2_5_VL, QWEN2_VL, QWEN3_VL, Family, ModelConfig, family_of

SHARD_BYTES = 1 << 30
SECTIONS = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
INTERLEAVED = {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
STD = 0.02
TOWER_2 = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
TOWER_2_5 = {
    "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
TOWER_3 = {"depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
TOWER_3_8B = {"depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
# Public configurations; of the text: hidden, MLP, layers, heads, KV heads, tied.
SHAPES: dict[str, tuple[Family, tuple[int, int, int, int, int, bool], dict[str, Any]]] = {
    "2b": (QWEN2_VL, (1536, 8960, 28, 12, 2, True), TOWER_2),
    "7b": (QWEN2_VL, (3584, 18944, 28, 28, 4, False), TOWER_2),
    "2.5-3b": (QWEN2_5_VL, (2048, 11008, 36, 16, 2, True), TOWER_2_5),
    "2.5-7b": (QWEN2_5_VL, (3584, 18944, 28, 28, 4, False), TOWER_2_5),
    "3-2b": (QWEN3_VL, (2048, 6144, 28, 16, 8, True), TOWER_3),
    "3-4b": (QWEN3_VL, (2560, 9728, 36, 32, 8, True), TOWER_3),
    "3-8b": (QWEN3_VL, (4096, 12288, 36, 32, 8, False), TOWER_3_8B),
}
COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
PROCESSOR = "preprocessor_config.json"
MAX_VISUAL_TOKENS = 16_384  # as in the public configurations; the small model's own is 1,280


def shape_config(name: str, small: ModelConfig) -> ModelConfig:
    """A public shape with the small model's token ids."""
    family, (hidden, mlp, layers, heads, kv_heads, tied), tower = SHAPES[name]
    qwen3 = family is QWEN3_VL
    text = {
        "vocab_size": 151_936 if tied or qwen3 else 152_064,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": INTERLEAVED if qwen3 else SECTIONS,
        "bos_token_id": small.text_config.bos_token_id,
        "eos_token_id": small.text_config.eos_token_id,
        "pad_token_id": small.text_config.pad_token_id,
    }
    if qwen3:
        text["head_dim"] = 128
    vision = {**tower, ("hidden_size" if family is QWEN2_VL else "out_hidden_size"): hidden}
    ids = {key: getattr(small, key) for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    config: ModelConfig = family.config(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="2b")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the numbers are drawn")
    args = parser.parse_args()
    tiny = resolve_model("tiny")
    config = shape_config(args.shape, open_checkpoint("tiny").config)
    with torch.device("meta"):
        model = family_of(config).model._from_config(config, dtype=torch.float16)
    args.output.mkdir(parents=True)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    names = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = number = total = 0
    for position, (name, shape) in enumerate(names):
        is_norm = len(shape) == 1 and name.endswith("weight")
        tensor = (
            torch.ones(shape, dtype=torch.float16) if is_norm else (torch.randn(shape, generator=generator, device=args.device) * STD).half().cpu()
        )
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= SHARD_BYTES or position == len(names) - 1:
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(shard, args.output / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    (args.output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    config.architectures = [family_of(config).model.__name__]
    config.save_pretrained(args.output)
    for file in COPIED:
        shutil.copy(tiny / file, args.output / file)
    processor = json.loads((tiny / PROCESSOR).read_text())
    vision = config.vision_config
    largest = MAX_VISUAL_TOKENS * (vision.patch_size * vision.spatial_merge_size) ** 2
    (args.output / PROCESSOR).write_text(json.dumps({**processor, "patch_size": vision.patch_size, "max_pixels": largest}, indent=2))
    print(f"{args.output}: {sum(torch.Size(s).numel() for _, s in names) / 1e9:.2f} G parameters, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
