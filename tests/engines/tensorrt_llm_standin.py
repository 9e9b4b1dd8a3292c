"""TensorRT-LLM as far as it was read: a record of its published API, and a stand-in that keeps to it and computes with Hugging Face's model.

Read in ``tensorrt_llm`` of NVIDIA/TensorRT-LLM: ``llmapi/llm.py`` at 4c05a748, ``inputs/registry.py`` at 3a5845e2, ``inputs/data.py`` at 2a9abd95,
``_torch/models/modeling_qwen2vl.py`` at c666e7ea and ``_torch/models/modeling_multimodal_utils.py`` at 8bc4e096 (autumn 2025, between 1.1 and 1.2);
and of 2026, in the fork yechank-nvidia/TensorRT-LLM, the first, fourth and fifth at 328aa1d9, 0d3a07f8 and 0c749552. Where they differ, the stand-in
can be either. ``_torch/models/modeling_qwen3vl.py`` was read at 002f3cc3 (2026): a row of embeddings is the embedding, then what each of the
decoder's first layers adds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

# Object → parameters that we give or are given. What else there is has defaults.
CONTRACT = {
    "tensorrt_llm.llmapi:LLM.generate": ("inputs", "sampling_params"),
    "tensorrt_llm.llmapi:LLM.generate_async": ("inputs", "sampling_params"),
    "tensorrt_llm.inputs.registry:register_input_processor": ("processor_cls", "model_type", "placeholder_metadata"),
    "tensorrt_llm.inputs.registry:MULTIMODAL_PLACEHOLDER_REGISTRY.get_placeholder_metadata": ("model_type",),
    "tensorrt_llm.inputs.registry:BaseMultimodalInputProcessor.attach_multimodal_embeddings": ("inputs", "multimodal_embedding", "sampling_params"),
    "tensorrt_llm._torch.models.modeling_qwen2vl:Qwen2VLInputProcessorBase.get_mrope_config": ("input_ids", "image_grid_thw", "video_grid_thw",
                                                                                               "attention_mask"),
    "tensorrt_llm._torch.models.modeling_qwen2vl:Qwen2VLModel": ("model_config",),
    "tensorrt_llm._torch.models.modeling_qwen2vl:Qwen2_5_VLModel": ("model_config",),
    "tensorrt_llm._torch.models.modeling_qwen3vl:Qwen3VLInputProcessorBase.get_mrope_config": ("input_ids", "image_grid_thw", "video_grid_thw",
                                                                                               "attention_mask"),
    "tensorrt_llm._torch.models.modeling_qwen3vl:Qwen3VLModel": ("model_config",),
}  # fmt: skip
# multimodal_data["mrope_config"]: name → shape for a prompt of S tokens, dtype.
MROPE_CONFIG = {"mrope_position_ids": ((3, 1, "S"), "int64"), "mrope_position_deltas": ((1, 1), "int32")}


def check_mrope_config(config: dict[str, Any], tokens: int) -> None:
    """Tensors as TensorRT-LLM's own processor makes them."""
    found = {name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in config.items()}
    assert found == {name: (tuple(tokens if n == "S" else n for n in shape), dtype) for name, (shape, dtype) in MROPE_CONFIG.items()}


@dataclass
class KvCacheConfig:
    enable_block_reuse: bool = True


class BaseMultimodalInputProcessor:
    def attach_multimodal_embeddings(self, inputs: Any, multimodal_embedding: Any, sampling_params: Any) -> Any:
        raise NotImplementedError("Input processor does not support multimodal embedding input")


class Qwen2VLInputProcessorBase(BaseMultimodalInputProcessor):
    def __init__(self, model_path: str, config: Any, tokenizer: Any, trust_remote_code: bool = True, **kwargs: Any) -> None:
        self.config, self.tokenizer = config, tokenizer

    def get_mrope_config(
        self, input_ids: Any, image_grid_thw: Any, video_grid_thw: Any, attention_mask: Any, second_per_grid_ts: Any = None
    ) -> dict[str, Any]:
        import torch

        assert image_grid_thw is None and video_grid_thw is None, "the stand-in has no tower"
        positions = torch.arange(input_ids.shape[1]).expand(3, 1, -1)
        return {"mrope_position_ids": positions, "mrope_position_deltas": torch.zeros(1, 1, dtype=torch.int32)}

    def __call__(self, inputs: Any, sampling_params: Any) -> tuple[list[int], dict[str, Any] | None]:
        input_ids = self.tokenizer(inputs["prompt"], return_tensors="pt").input_ids
        config = self.get_mrope_config(input_ids, None, None, None)
        return input_ids[0].tolist(), {"multimodal_data": {"mrope_config": config}}


class EarlierInputProcessor(Qwen2VLInputProcessorBase):
    """Before 2026: where embeddings go is marked by a token outside the vocabulary."""

    def __init__(self, model_path: str, config: Any, tokenizer: Any, trust_remote_code: bool = True, **kwargs: Any) -> None:
        super().__init__(model_path, config, tokenizer, trust_remote_code, **kwargs)
        self.tllm_multimodal_token_id = config.text_config.vocab_size + 1


class Qwen2VLModel:
    def __init__(self, model_config: Any, *args: Any, **kwargs: Any) -> None: ...


class Qwen2_5_VLModel:  # noqa: N801  # its name there
    def __init__(self, model_config: Any, *args: Any, **kwargs: Any) -> None: ...


class Qwen3VLModel:
    def __init__(self, model_config: Any, *args: Any, **kwargs: Any) -> None: ...


MODELS: dict[str, type] = {"qwen2_vl": Qwen2VLModel, "qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel}  # by model_type


class Registry:
    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {model_type: object() for model_type in MODELS}
        self.processors: dict[type, type] = {}

    def get_placeholder_metadata(self, model_type: str) -> Any:
        return self.metadata[model_type]

    def register_input_processor(self, processor_cls: type, model_type: str, placeholder_metadata: Any = None) -> Any:
        def wrapper(model_cls: type) -> type:
            assert placeholder_metadata is self.metadata[model_type] and model_cls is MODELS[model_type]
            self.processors[model_cls] = processor_cls
            return model_cls

        return wrapper


class LLM:
    """Greedy; ``prefill_logits`` float32 [vocab_size] of the last request stay."""

    registry: Registry

    def __init__(self, model: str, tokenizer: Any = None, *, kv_cache_config: Any = None, max_tokens: int = 8, **kwargs: Any) -> None:
        from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

        self.model = AutoModelForImageTextToText.from_pretrained(model, dtype="float32").eval()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(model) / "tokenizer.json"))
        self.input_processor = self.registry.processors[MODELS[self.model.config.model_type]](
            model, self.model.config, self.tokenizer, trust_remote_code=True
        )
        self.kv_cache_config, self.max_tokens, self.options = kv_cache_config or KvCacheConfig(), max_tokens, kwargs

    def generate(self, inputs: Any, sampling_params: Any = None) -> Any:
        if isinstance(inputs, dict):
            return self.generate_async(inputs, sampling_params)
        return [self.generate_async(request, sampling_params) for request in inputs]

    def generate_async(self, inputs: Any, sampling_params: Any = None) -> Any:
        assert set(inputs) <= {"prompt", "multi_modal_embeddings"} and inputs["prompt"]  # without a prompt, early versions drop the embeddings
        if "multi_modal_embeddings" in inputs:
            token_ids, extra = self.input_processor.attach_multimodal_embeddings(inputs, inputs["multi_modal_embeddings"], sampling_params)
        else:
            token_ids, extra = self.input_processor(inputs, sampling_params)
        assert all(type(token) is int for token in token_ids)
        answer = self._greedy(token_ids, extra["multimodal_data"])
        return SimpleNamespace(prompt=inputs["prompt"], outputs=[SimpleNamespace(token_ids=answer, text=self.tokenizer.decode(answer))])

    def _greedy(self, token_ids: list[int], data: dict[str, Any]) -> list[int]:
        """A prefill of all tokens, then each token at the position that the published engine gives it: tokens before it and the delta."""
        import torch

        check_mrope_config(data["mrope_config"], len(token_ids))
        ids = torch.tensor(token_ids)
        packed = data.get("multimodal_embedding")
        width = self.model.get_input_embeddings().embedding_dim
        embeddings = self._fuse(ids, packed[:, :width] if packed is not None else None)
        added = {} if packed is None or packed.shape[1] == width else self._deepstack(ids, packed, width)
        positions, delta = data["mrope_config"]["mrope_position_ids"], int(data["mrope_config"]["mrope_position_deltas"])
        stop, answer = self.model.generation_config.eos_token_id, list[int]()
        past, logits = None, None
        with torch.no_grad():
            while len(answer) < self.max_tokens and (not answer or answer[-1] not in np.atleast_1d(stop)):
                language = self.model.model.language_model
                out = language(inputs_embeds=embeddings[None], position_ids=positions, past_key_values=past, use_cache=True, **added)
                past, added = out.past_key_values, {}
                logits = self.model.lm_head(out.last_hidden_state[0, -1]).float().numpy()
                if not answer:
                    self.prefill_logits = logits
                answer.append(int(logits.argmax()))
                embeddings = self.model.get_input_embeddings()(torch.tensor(answer[-1:]))
                positions = torch.full((3, 1, 1), len(token_ids) + len(answer) - 1 + delta)
        return answer

    def _deepstack(self, ids: Any, packed: Any, width: int) -> dict[str, Any]:
        """What Hugging Face's decoder calls the features that its first layers add: one tensor a layer, as many as the tower has mergers for."""
        levels = list(packed.split(width, 1))[1:]
        assert len(levels) == len(self.model.config.vision_config.deepstack_visual_indexes)
        return {"visual_pos_masks": self._marked(ids)[None], "deepstack_visual_embeds": levels}

    def _marked(self, ids: Any) -> Any:
        earlier = isinstance(self.input_processor, EarlierInputProcessor)
        return ids >= self.model.get_input_embeddings().num_embeddings if earlier else ids == self.model.config.image_token_id

    def _fuse(self, ids: Any, embeddings: Any) -> Any:
        """Embeddings in the place of the tokens that mark them, which must be as many."""
        embed = self.model.get_input_embeddings()
        marked = self._marked(ids)
        if embeddings is None:
            assert not marked.any()
            return embed(ids)
        assert embeddings.ndim == 2 and int(marked.sum()) == embeddings.shape[0]
        fused = embed(ids.masked_fill(marked, 0)).detach()
        fused[marked] = embeddings.to(fused.dtype)
        return fused


def install(monkeypatch: pytest.MonkeyPatch, *, earlier: bool = False) -> Registry:
    """Put the stand-in where ``tensorrt_llm`` is imported from; ``earlier`` makes it that before 2026."""
    registry = Registry()
    processor = EarlierInputProcessor if earlier else Qwen2VLInputProcessorBase
    registry.processors |= dict.fromkeys(MODELS.values(), processor)
    contents: dict[str, dict[str, Any]] = {
        "tensorrt_llm": {},
        "tensorrt_llm.llmapi": {"LLM": type("LLM", (LLM,), {"registry": registry}), "KvCacheConfig": KvCacheConfig},
        "tensorrt_llm.inputs": {},
        "tensorrt_llm.inputs.registry": {
            "register_input_processor": registry.register_input_processor,
            "MULTIMODAL_PLACEHOLDER_REGISTRY": registry,
            "BaseMultimodalInputProcessor": BaseMultimodalInputProcessor,
        },
        "tensorrt_llm._torch": {},
        "tensorrt_llm._torch.models": {},
        "tensorrt_llm._torch.models.modeling_qwen2vl": {
            "Qwen2VLInputProcessorBase": processor,
            "Qwen2VLModel": Qwen2VLModel,
            "Qwen2_5_VLModel": Qwen2_5_VLModel,
        },
        "tensorrt_llm._torch.models.modeling_qwen3vl": {"Qwen3VLInputProcessorBase": processor, "Qwen3VLModel": Qwen3VLModel},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return registry
