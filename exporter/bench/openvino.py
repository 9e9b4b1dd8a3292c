"""OpenVINO GenAI's ``VLMPipeline`` on a folder that optimum-intel exported, with its own pruning before the language model."""

from __future__ import annotations

import time
from importlib import metadata

import numpy as np

from ...engines import open_engine
from .measurement import Request, Timing, peak_memory_bytes, random_image
from .subjects import SubjectSpec

__all__ = ["OpenVinoSubject", "kept_tokens"]


def kept_tokens(visual_tokens: int, pruning_ratio: int) -> int:
    """Visual tokens that the pipeline hands to its language model; it rounds down."""
    return visual_tokens * (100 - pruning_ratio) // 100


class OpenVinoSubject:
    """The pipeline on the CPU. It tells the time to first token, and not what of it is vision."""

    def __init__(self, spec: SubjectSpec) -> None:
        import openvino
        import openvino_genai

        self._openvino, self._genai = openvino, openvino_genai
        self.engine = open_engine(spec.engine, check_hashes=False)
        self.pruning_ratio = spec.pruning_ratio
        hints = {"INFERENCE_NUM_THREADS": spec.threads, "INFERENCE_PRECISION_HINT": "f32" if spec.precision == "fp32" else "f16"}
        self.pipeline = openvino_genai.VLMPipeline(spec.model, "CPU", **hints)
        self.versions = {name: metadata.version(name) for name in ("openvino", "openvino-genai")}

    def measure(self, request: Request) -> Timing:
        """Greedy, past stop tokens."""
        options = self._genai.GenerationConfig()
        options.max_new_tokens, options.ignore_eos, options.do_sample = request.new_tokens, True, False
        options.pruning_ratio = self.pruning_ratio
        image = self._openvino.Tensor(random_image(request.side)[None])
        began = time.perf_counter()
        result = self.pipeline.generate(request.prompt, images=[image], generation_config=options)
        took = time.perf_counter() - began
        first_token_s = result.perf_metrics.get_ttft().mean / 1e3
        generated = result.perf_metrics.get_num_generated_tokens()
        visual = (request.side // self.engine.image_processor.factor) ** 2
        kept = kept_tokens(visual, self.pruning_ratio)
        return Timing(
            vision_s=None,
            prefill_s=None,
            sampling_s=None,
            first_token_s=first_token_s,
            decode_s=took - first_token_s,
            new_tokens=generated,
            visual_tokens=(visual, kept) if self.pruning_ratio else (visual,),
            text_tokens=max(0, int(np.asarray(result.perf_metrics.get_num_input_tokens())) - kept),  # it counts what is left
            kv_bytes=None,
            peak_memory_bytes=peak_memory_bytes(),
        )
