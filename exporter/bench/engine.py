"""An engine directory in a session, step by step, so that each step has its time."""

from __future__ import annotations

import time
from importlib import metadata

import numpy as np

from ...engines import SamplingParams, Session, open_engine
from ...engines.request import prompt_lengths
from ...engines.results import held_bytes, stage_counts
from ...engines.sampling import next_token
from .measurement import Request, Timing, peak_memory_bytes, random_image
from .subjects import SubjectSpec

__all__ = ["EngineSubject"]


class EngineSubject:
    """An engine on ONNX Runtime."""

    def __init__(self, spec: SubjectSpec) -> None:
        self.session = Session(open_engine(spec.engine, check_hashes=False), provider=spec.provider, threads=spec.threads)
        installed = metadata.packages_distributions().get("onnxruntime", ["onnxruntime"])[0]
        self.versions = {installed: metadata.version(installed)}

    def measure(self, request: Request) -> Timing:
        """Greedy, past stop tokens."""
        session, engine, image = self.session, self.session.engine, random_image(request.side)
        sampling, generator = SamplingParams(), np.random.default_rng(0)
        began = time.perf_counter()
        prepared = session.prepare(request.prompt, [image])
        before_prefill = time.perf_counter()
        step = session.prefill(prepared)
        after_prefill = time.perf_counter()
        token = next_token(step.logits, sampling, generator)
        first_token = time.perf_counter()
        for _ in range(request.new_tokens - 1):
            token = next_token(session.decode(token).logits, sampling, generator)
        decode_s = time.perf_counter() - first_token

        lengths = prompt_lengths(
            engine.segments, text_tokens=prepared.text_tokens, visual_tokens=prepared.visual_positions.size, budget=prepared.budget
        )
        in_cache = [int(length) + request.new_tokens - 1 for length in lengths]
        return Timing(
            vision_s=prepared.vision_seconds,
            prefill_s=after_prefill - before_prefill,
            sampling_s=first_token - after_prefill,
            first_token_s=first_token - began,
            decode_s=decode_s,
            new_tokens=request.new_tokens,
            visual_tokens=(prepared.visual_tokens, *(stage.kept for stage in stage_counts(engine, prepared.budgets))),
            text_tokens=prepared.text_tokens,
            kv_bytes=held_bytes(engine, in_cache),
            peak_memory_bytes=peak_memory_bytes(),
        )
