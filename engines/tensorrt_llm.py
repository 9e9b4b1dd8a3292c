"""TensorRT-LLM: images are pruned here, the decoder runs there.

TensorRT-LLM (PyTorch backend) loads the Hugging Face checkpoint itself, has one KV length per request and adds nothing to attention scores, so a
schedule for it drops visual tokens in the tower and before the decoder, nowhere else, and has no proportional attention. ::

    feed, llm = Feed(engine), load_llm(engine, "folder of the checkpoint")
    outputs = llm.generate([feed.inputs("What is this?", ["photo.jpg"]), feed.inputs("Hello")])

Its LLM API takes embeddings as ``multi_modal_embeddings``, but its processor for these models refuses them, and the related ones guess the image's
grid from the number of tokens: wrong where some are gone. So a processor of ours takes its place (:func:`register_processor`), which hands on
embeddings with the M-RoPE positions that survivors have had in the whole image. docs/tensorrt_llm.md says which versions were read. It has not run
on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..exporter.schedule import Schedule
from ..exporter.weight_files import fingerprint
from .backends.base import VisionBackend
from .backends.onnxruntime import OnnxRuntimeVision
from .errors import EngineError
from .manifest import Engine
from .prompt import Prompt, PromptEncoder
from .request import ImageSource, prepare_request, read_request

__all__ = ["Feed", "PrunedPrompt", "check_schedule", "load_llm", "register_processor"]

MODELS = {  # family → module, its input processor and its class there
    "qwen2_vl": ("modeling_qwen2vl", "Qwen2VLInputProcessorBase", "Qwen2VLModel"),
    "qwen2_5_vl": ("modeling_qwen2vl", "Qwen2VLInputProcessorBase", "Qwen2_5_VLModel"),
    "qwen3_vl": ("modeling_qwen3vl", "Qwen3VLInputProcessorBase", "Qwen3VLModel"),
}


@dataclass(frozen=True)
class PrunedPrompt:
    """A prompt whose images have lost tokens: the entry ``multi_modal_embeddings`` of what ``LLM.generate`` takes.

    Attributes:
        token_ids: int64 [S], survivors written as image tokens.
        visual_positions: int64 [V], their columns.
        embeddings: T [V, visual_width]; DeepStack's features lie behind the embedding, as TensorRT-LLM packs them as well.
        position_ids: int64 [3, 1, S], M-RoPE.
        position_delta: int32 [1, 1]; a token of the answer stands, on each axis, at the number of tokens before it and this.
    """

    token_ids: NDArray[np.int64]
    visual_positions: NDArray[np.int64]
    embeddings: NDArray[Any]
    position_ids: NDArray[np.int64]
    position_delta: NDArray[np.int32]


class Feed:
    """Makes of prompts and images what ``LLM.generate`` takes. Needs neither PyTorch nor TensorRT-LLM.

    Args:
        engine: from :func:`vflow.engines.open_engine`.
        provider: of ONNX Runtime, which runs the vision graph: ``cpu`` or ``cuda``; None takes CUDA where it is.
        threads: of ONNX Runtime on the CPU; None leaves it to the runtime.
        backend: what computes the vision graph, instead of ONNX Runtime.

    Raises:
        EngineError: a schedule with stages inside the decoder or proportional attention, or an engine that cannot be loaded on this machine.
    """

    def __init__(self, engine: Engine, *, provider: str | None = None, threads: int | None = None, backend: VisionBackend | None = None) -> None:
        check_schedule(engine.schedule, engine.shape.decoder.layers)
        self.engine = engine
        self.encoder = PromptEncoder(engine.tokenizer_path, engine.chat_template_path, engine.tokens)
        self.backend = backend or OnnxRuntimeVision(engine, provider=provider, threads=threads)

    def inputs(self, prompt: Prompt, images: Sequence[ImageSource] = (), *, keep_scale: float = 1.0, max_pixels: int | None = None) -> dict[str, Any]:
        """One request of ``LLM.generate`` or ``generate_async``; a list of them is a batch. Arguments as :meth:`vflow.engines.Session.stream`.

        Returns:
            ``prompt``, the text with one placeholder an image, and for a request with images ``multi_modal_embeddings``, a :class:`PrunedPrompt`.
            Without images TensorRT-LLM does by itself all that there is to do.

        Raises:
            EngineError: a request that the engine cannot take; the message says what to change.
        """
        request = read_request(self.engine, self.encoder, prompt, images, keep_scale=keep_scale, max_pixels=max_pixels, dtype=self.backend.dtype)
        text = self.encoder.render(prompt, len(images))
        if not images:
            return {"prompt": text}
        prepared = prepare_request(self.engine, self.backend, request)
        pruned = PrunedPrompt(
            token_ids=prepared.input_ids,
            visual_positions=prepared.visual_positions,
            embeddings=prepared.visual_embeds,
            position_ids=prepared.position_ids[:, None],
            position_delta=np.array([[prepared.next_position - prepared.input_ids.size]], np.int32),
        )
        return {"prompt": text, "multi_modal_embeddings": pruned}


def check_schedule(schedule: Schedule, layers: int) -> None:
    """Refuse what TensorRT-LLM cannot run; ``layers`` are the decoder's.

    Raises:
        EngineError: stages inside the decoder, or proportional attention.
    """
    again = f"build with --target tensorrt-llm --keep {schedule.average_keep(layers):.3g}, which"
    if schedule.later_stages:
        places = ", ".join(str(stage.layer) for stage in schedule.later_stages)
        raise EngineError(
            f"TensorRT-LLM has one KV length per request, this schedule drops visual tokens inside the decoder (before layers {places}); "
            f"{again} drops as many before it"
        )
    if schedule.proportional_attention:
        raise EngineError(f"TensorRT-LLM cannot add to attention scores, this schedule has proportional attention; {again} leaves it out")


def load_llm(engine: Engine, checkpoint: str | Path, **options: Any) -> Any:
    """TensorRT-LLM's ``LLM`` for the model that an engine was built from, ready for what :meth:`Feed.inputs` makes.

    Args:
        checkpoint: the folder that the engine was built from (TensorRT-LLM loads the decoder from there).
        options: of ``LLM``.

    Raises:
        EngineError: another model, no TensorRT-LLM, a schedule that it cannot run, or an option that would give wrong answers.
        CheckpointError: no checkpoint there.
    """
    check_schedule(engine.schedule, engine.shape.decoder.layers)
    found = fingerprint(Path(checkpoint))
    if found != engine.model_fingerprint:
        raise EngineError(
            f"{checkpoint} ({found}) is not the model of this engine ({engine.model_fingerprint}, {engine.model_name}); give the folder of that"
        )
    register_processor(engine.family)
    api = import_module("tensorrt_llm.llmapi")
    caches = options.pop("kv_cache_config", None) or api.KvCacheConfig(enable_block_reuse=False)
    if caches.enable_block_reuse:
        # Blocks are found again by token ids, and those of pruned images are placeholders: equal texts would share the first one's image.
        raise EngineError("kv_cache_config must have enable_block_reuse=False: the KV cache of one picture would be taken for another's")
    return api.LLM(model=str(checkpoint), kv_cache_config=caches, **options)


def register_processor(family: str) -> None:
    """Put our input processor in the place of TensorRT-LLM's own, for every ``LLM`` of this family that this process makes from now on.

    Pictures that are given to TensorRT-LLM directly, as ``multi_modal_data``, are answered as before, unpruned.

    Raises:
        EngineError: TensorRT-LLM is missing.
    """
    module, base, model = MODELS[family]
    try:
        models = import_module(f"tensorrt_llm._torch.models.{module}")
        registry = import_module("tensorrt_llm.inputs.registry")
    except ImportError as error:
        raise EngineError(f"TensorRT-LLM cannot be imported ({error}); pip install 'vflow-export[tensorrt-llm]', on a machine with a GPU") from None
    methods = {"attach_multimodal_embeddings": _attach_multimodal_embeddings}
    processor = type(f"Pruned{base.removesuffix('Base')}", (getattr(models, base),), methods)
    placeholders = registry.MULTIMODAL_PLACEHOLDER_REGISTRY.get_placeholder_metadata(family)
    registry.register_input_processor(processor, model_type=family, placeholder_metadata=placeholders)(getattr(models, model))


def _attach_multimodal_embeddings(
    self: Any, inputs: Any, multimodal_embedding: PrunedPrompt, sampling_params: Any
) -> tuple[list[int], dict[str, Any]]:
    """Method of the input processor: the prompt's token ids, and tensors for the model."""
    import torch

    token_ids = multimodal_embedding.token_ids.copy()
    # Where embeddings go is marked by a token outside the vocabulary in versions whose processor names one, else by the image token.
    token_ids[multimodal_embedding.visual_positions] = getattr(self, "tllm_multimodal_token_id", token_ids[multimodal_embedding.visual_positions])
    positions = {
        "mrope_position_ids": torch.from_numpy(multimodal_embedding.position_ids),
        "mrope_position_deltas": torch.from_numpy(multimodal_embedding.position_delta),
    }
    embeddings = torch.from_numpy(multimodal_embedding.embeddings)
    return token_ids.tolist(), {"multimodal_data": {"multimodal_embedding": embeddings, "mrope_config": positions}}
