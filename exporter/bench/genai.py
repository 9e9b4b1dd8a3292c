"""onnxruntime-genai: the text decoder alone, as its own model builder makes it.

Its builder (0.18) knows Qwen2.5-VL and Qwen3-VL but not Qwen2-VL, and exports of both the decoder only. So any decoder is given to it as what it is
without images, a Qwen2 or Qwen3: the same layers with one rotary position a token instead of three. Prompts have as many tokens as with an image, and
there is no vision tower in the time to first token.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from ...engines import open_engine
from ...engines.errors import EngineError
from ...engines.prompt import PromptEncoder
from ...engines.results import token_bytes
from .measurement import Request, Timing, peak_memory_bytes
from .subjects import SubjectSpec

__all__ = ["GenaiSubject"]

BUILT = "genai_config.json"  # written last


class GenaiSubject:
    """The decoder of the engine's checkpoint, built once into the workspace."""

    def __init__(self, spec: SubjectSpec) -> None:
        built = Path(spec.workspace) / f"genai-{spec.precision}"
        if not (built / BUILT).exists():
            _build(spec, built)
        import onnxruntime_genai as genai

        self._genai = genai
        self.engine = open_engine(spec.engine, check_hashes=False)
        self.encoder = PromptEncoder(self.engine.tokenizer_path, self.engine.chat_template_path, self.engine.tokens)
        config = genai.Config(str(built))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": spec.threads}}}}))
        self.model = genai.Model(config)
        self.versions = {"onnxruntime-genai": metadata.version("onnxruntime-genai")}

    def measure(self, request: Request) -> Timing:
        """Greedy, past stop tokens, after a prompt whose visual tokens are one text token again and again."""
        visual = (request.side // self.engine.image_processor.factor) ** 2
        tokens = self.encoder.encode(request.prompt, 1)
        expanded = [t for token in tokens for t in ([0] * visual if token == self.engine.tokens.image else [token])]
        length = len(expanded) + request.new_tokens
        began = time.perf_counter()
        options = self._genai.GeneratorParams(self.model)
        options.set_search_options(do_sample=False, min_length=length, max_length=length)  # below its least length a stop token is not chosen
        generator = self._genai.Generator(self.model, options)
        generator.append_tokens(np.array([expanded], np.int32))
        after_prefill = time.perf_counter()
        generator.generate_next_token()
        first_token = time.perf_counter()
        for _ in range(request.new_tokens - 1):
            generator.generate_next_token()
        decode_s = time.perf_counter() - first_token
        return Timing(
            vision_s=None,
            prefill_s=after_prefill - began,
            sampling_s=first_token - after_prefill,
            first_token_s=first_token - began,
            decode_s=decode_s,
            new_tokens=generator.token_count() - len(expanded),
            visual_tokens=(visual,),
            text_tokens=len(expanded) - visual,
            kv_bytes=self.engine.shape.decoder.layers * token_bytes(self.engine) * (length - 1),
            peak_memory_bytes=peak_memory_bytes(),
        )


def _build(spec: SubjectSpec, output: Path) -> None:
    """Make a text checkpoint and run the model builder on it, in processes of their own, so that their memory is not counted."""
    text = output.with_name("qwen2-text")
    options = ["-p", spec.precision, "-e", spec.provider, "-c", str(output.with_name("cache"))]
    for module, arguments in (
        (f"{__package__}.genai_text", [spec.model, str(text)]),
        ("onnxruntime_genai.models.builder", ["-m", str(text), "-o", str(output), *options]),
    ):
        done = subprocess.run([sys.executable, "-m", module, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise EngineError(f"{module} failed ({(done.stderr.strip().splitlines() or ['no message'])[-1]})")
