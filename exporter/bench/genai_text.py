"""A checkpoint's decoder as the Qwen2 or Qwen3 checkpoint that it is without images: what onnxruntime-genai's model builder takes.

python -m vflow.exporter.bench.genai_text MODEL FOLDER
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen3Config

from ..checkpoint import Checkpoint, TensorReader, open_checkpoint
from ..models import family_of

__all__ = ["write_text_model"]

SAME_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
    "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def write_text_model(checkpoint: Checkpoint, folder: Path) -> None:
    """Weights, configuration (one rotary position a token instead of three) and tokenizer into a new ``folder``."""
    folder.mkdir(parents=True)
    with TensorReader(checkpoint) as reader:
        names = [name for name in checkpoint.tensors if not name.startswith("visual.")]
        weights = {name.replace("language_model.", "model."): reader.read(name).contiguous() for name in names}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (checkpoint.path / name).exists():
            shutil.copy(checkpoint.path / name, folder / name)
    text = checkpoint.config.text_config
    qwen3 = family_of(checkpoint.config).own_head_dim
    config = (Qwen3Config if qwen3 else Qwen2Config)(
        **{name: getattr(text, name) for name in SAME_FIELDS},
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_parameters["rope_theta"]},
        tie_word_embeddings=checkpoint.config.tie_word_embeddings,
        architectures=["Qwen3ForCausalLM" if qwen3 else "Qwen2ForCausalLM"],
        **({"head_dim": text.head_dim, "attention_bias": text.attention_bias} if qwen3 else {}),
    )
    config.save_pretrained(folder)


if __name__ == "__main__":
    write_text_model(open_checkpoint(sys.argv[1]), Path(sys.argv[2]))
