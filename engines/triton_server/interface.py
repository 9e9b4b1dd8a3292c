"""The tensors and parameters of the Triton server model: written into config.pbtxt by ``build``, read by the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["INPUTS", "OUTPUTS", "PARAMETERS", "TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the model: its type as in config.pbtxt (without ``TYPE_``), and its shape, −1 where the request says."""

    name: str
    dtype: Literal["BOOL", "FP64", "INT64", "STRING", "UINT8"]
    shape: tuple[int, ...] = (1,)


# All may be left out, but for one of prompt and messages. Numbers are as wide as JSON's, so that nothing wraps or is rounded on the way.
INPUTS = (
    TensorSpec("prompt", "STRING"),
    TensorSpec("messages", "STRING"),
    TensorSpec("images", "STRING", (-1,)),
    TensorSpec("pixels", "UINT8", (-1, -1, -1, 3)),
    TensorSpec("max_new_tokens", "INT64"),
    TensorSpec("temperature", "FP64"),
    TensorSpec("top_k", "INT64"),
    TensorSpec("top_p", "FP64"),
    TensorSpec("seed", "INT64"),
    TensorSpec("stop", "STRING", (-1,)),
    TensorSpec("keep_scale", "FP64"),
    TensorSpec("max_pixels", "INT64"),
    TensorSpec("timeout", "FP64"),
    TensorSpec("stream", "BOOL"),
)

# text comes with every response, the others with the last one.
OUTPUTS = (
    TensorSpec("text", "STRING"),
    TensorSpec("finish_reason", "STRING"),
    TensorSpec("prompt_tokens", "INT64"),
    TensorSpec("new_tokens", "INT64"),
    TensorSpec("visual_tokens", "INT64"),
    TensorSpec("visual_tokens_kept", "INT64"),
    TensorSpec("vision_s", "FP64"),
    TensorSpec("prefill_s", "FP64"),
    TensorSpec("ttft_s", "FP64"),
    TensorSpec("tokens_per_s", "FP64"),  # not where the answer is one token
)

PARAMETERS = ("engine", "slots", "kv_memory", "queue_limit", "provider", "threads", "drain")
