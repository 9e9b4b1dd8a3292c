"""The Hugging Face model with its own ``generate``: scaled dot product attention, its own cache, the same pixels and the same prompt."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from ...engines import open_engine
from ...engines.preprocess import preprocess_image
from ...engines.prompt import PromptEncoder
from ..build import PRECISIONS
from ..checkpoint import open_checkpoint
from ..model import load_model
from .measurement import Request, Timing, peak_memory_bytes, random_image
from .subjects import SubjectSpec

__all__ = ["HuggingFaceSubject"]


class HuggingFaceSubject:
    """The family's ``…ForConditionalGeneration`` on the engine's checkpoint."""

    def __init__(self, spec: SubjectSpec) -> None:
        torch.set_num_threads(spec.threads)
        self.engine = open_engine(spec.engine, check_hashes=False)
        self.encoder = PromptEncoder(self.engine.tokenizer_path, self.engine.chat_template_path, self.engine.tokens)
        self.device = torch.device(spec.provider)
        self.dtype = PRECISIONS[spec.precision]
        self.model = load_model(open_checkpoint(spec.model), self.dtype).to(self.device)
        self.model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # no stop token: the answer has the length asked for
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        self._marks: dict[str, float] = {}
        self.model.model.visual.register_forward_pre_hook(lambda *_: self._mark("vision"))
        self.model.model.visual.register_forward_hook(lambda *_: self._mark("vision done"))
        self.model.register_forward_hook(lambda *_: self._mark("prefill done"))

    @torch.inference_mode()
    def measure(self, request: Request) -> Timing:
        """Greedy."""
        self._marks = {}
        clock = _Clock()
        image = random_image(request.side)
        began = time.perf_counter()
        patches = preprocess_image(image, self.engine.image_processor)
        preprocessed = time.perf_counter()
        visual_tokens = patches.pixel_values.shape[0] // self.engine.shape.tower.group
        tokens = self.encoder.encode(request.prompt, 1)
        expanded = [t for token in tokens for t in ([token] * visual_tokens if token == self.engine.tokens.image else [token])]
        input_ids = torch.tensor([expanded], device=self.device)
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            mm_token_type_ids=(input_ids == self.engine.tokens.image).int(),
            pixel_values=torch.from_numpy(patches.pixel_values).to(self.device, self.dtype),
            image_grid_thw=torch.tensor([patches.grid_thw], device=self.device),
            max_new_tokens=request.new_tokens,
            do_sample=False,
            streamer=clock,
            return_dict_in_generate=True,
        )
        vision_s = preprocessed - began + self._marks["vision done"] - self._marks["vision"]
        first_token_s = clock.times[0] - began
        sampling_s = clock.times[0] - self._marks["prefill done"]
        return Timing(
            vision_s=vision_s,
            prefill_s=first_token_s - sampling_s - vision_s,
            sampling_s=sampling_s,
            first_token_s=first_token_s,
            decode_s=clock.times[-1] - clock.times[0],
            new_tokens=len(clock.times),
            visual_tokens=(visual_tokens,),
            text_tokens=len(expanded) - visual_tokens,
            kv_bytes=sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers),
            peak_memory_bytes=peak_memory_bytes(),
        )

    def _mark(self, what: str) -> None:
        """Note when something happened first: prefill is the first of the calls."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._marks.setdefault(what, time.perf_counter())


class _Clock(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
    """Notes when each token arrives; the prompt comes first and is not counted."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        pass
