"""Make a checkpoint of any Qwen2-VL shape with random weights, to measure sizes and times without a download.

    python tools/make_model.py --shape 2b --output out/model-2b

Weights are fp16 safetensors, written one shard at a time; tokenizer and processor are the small model's. With ``--device cuda`` the numbers are other
ones and drawn in a moment.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from vflow.exporter.checkpoint import resolve_model

SHARD_BYTES = 1 << 30
STD = 0.02
# text: hidden, MLP, layers, heads, KV heads, tied; the tower is the same in all sizes (public configurations of Qwen2-VL)
SHAPES = {"2b": (1536, 8960, 28, 12, 2, True), "7b": (3584, 18944, 28, 28, 4, False)}
COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
PROCESSOR = "preprocessor_config.json"
MAX_PIXELS = 16_384 * 28 * 28  # as in the public configurations; the small model's own is 1,280 visual tokens


def shape_config(name: str, small: Qwen2VLConfig) -> Qwen2VLConfig:
    """A public shape with the small model's token ids."""
    hidden, mlp, layers, heads, kv_heads, tied = SHAPES[name]
    text = {
        "vocab_size": 151_936 if tied else 152_064,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
        "bos_token_id": small.text_config.bos_token_id,
        "eos_token_id": small.text_config.eos_token_id,
        "pad_token_id": small.text_config.pad_token_id,
    }
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": hidden, "num_heads": 16, "mlp_ratio": 4}
    ids = {key: getattr(small, key) for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="2b")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the numbers are drawn")
    args = parser.parse_args()
    tiny = resolve_model("tiny")
    config = shape_config(args.shape, Qwen2VLConfig.from_pretrained(tiny))
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration._from_config(config, dtype=torch.float16)
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
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    config.save_pretrained(args.output)
    for file in COPIED:
        shutil.copy(tiny / file, args.output / file)
    processor = json.loads((tiny / PROCESSOR).read_text())
    (args.output / PROCESSOR).write_text(json.dumps({**processor, "max_pixels": MAX_PIXELS}, indent=2))
    print(f"{args.output}: {sum(torch.Size(s).numel() for _, s in names) / 1e9:.2f} G parameters, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
