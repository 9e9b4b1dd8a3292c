"""Engines in lmms-eval (package ``lmms_eval`` from 0.7 on), whose tasks are the field's benchmarks:

``python -m lmms_eval --model vflow --model_args engine=out/engine --tasks mme``

lmms-eval finds the model by the entry point ``vflow`` of group ``lmms_eval.models``, which is :func:`manifest`. Decoding follows lmms-eval's own
Qwen2-VL: temperature alone decides between greedy and sampling, answers end before the first of a task's stop strings and are stripped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import track

from .directory import open_engine
from .errors import EngineError
from .sampling import SamplingParams
from .session import ImageSource, Session

try:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms

    missing = ""
except ImportError as error:  # the module can be read without the package, its model not be used
    lmms = object
    missing = f"lmms-eval cannot be imported ({error}); pip install 'vflow-export[lmms-eval]'"

__all__ = ["VFlow", "manifest"]

NEUTRAL = {"num_beams": 1, "repetition_penalty": 1}  # what engines do not have, and the value that asks for nothing; seen in lmms-eval's tasks


def manifest() -> Any:
    """How lmms-eval is to call the model, and where it is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vflow", chat_class_path=f"{__name__}.{VFlow.__name__}")


class VFlow(lmms):  # type: ignore[misc]  # Any, where the package is not installed
    """A chat model of lmms-eval that answers with an engine, one request at a time whatever the batch size.

    Args:
        engine: the engine directory.
        provider: ``cpu`` or ``cuda``; None takes that of ``device`` (``--device cuda:0``), or CUDA where it is.
        threads: CPU threads; None leaves it to the runtime.
        keep_scale: in (0, 1], share of the built budget that every request spends.
        max_pixels: images are scaled down to this many pixels; None takes the checkpoint's limit.
        seed: of the first request that samples; the next ones count on from it.
        batch_size, max_batch_size, device: what lmms-eval passes to every model.

    Raises:
        EngineError: lmms-eval is missing, or the engine cannot be loaded on this machine.
    """

    is_simple = False  # messages with images, not a text and a list of images

    def __init__(
        self,
        engine: str,
        provider: str | None = None,
        threads: int | None = None,
        keep_scale: float = 1.0,
        max_pixels: int | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        if missing:
            raise EngineError(missing)
        super().__init__()
        if provider is None and device is not None:
            provider = device.partition(":")[0]
        self.session = Session(open_engine(str(engine)), provider=provider, threads=threads)
        self._keep_scale, self._max_pixels = keep_scale, max_pixels
        self._next_seed = seed

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers to requests whose ``args`` are (context, doc_to_messages, generation options, document, task, split).

        Raises:
            EngineError: names task and document, and what to change; nothing is answered by an empty string instead.
        """
        return [self._answer(*request.args) for request in track(requests, "answer", disable=self.rank != 0)]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not there."""
        raise NotImplementedError("vflow engines have no multi-round generation in lmms-eval; choose tasks of output_type generate_until")

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Not there: lmms-eval asks chat models for generation only, and an engine gives the logits of the last token only."""
        raise NotImplementedError("vflow engines compute no log-likelihood of given answers; choose tasks of output_type generate_until")

    def _answer(self, context: str, doc_to_messages: Any, options: Mapping[str, Any], document: int, task: str, split: str) -> Any:
        try:
            messages, images = split_messages(doc_to_messages(self.task_dict[task][split][document]))
            return self._generate(messages, images, options)
        except EngineError as error:
            raise EngineError(f"task {task}, document {document}: {error}") from error

    def _generate(self, messages: list[dict[str, Any]], images: list[ImageSource], options: Mapping[str, Any]) -> Any:
        for name, neutral in NEUTRAL.items():
            if options.get(name, neutral) not in (neutral, None):
                raise EngineError(f"engines have no {name} (the task asks for {options[name]}); pass --gen_kwargs {name}={neutral}")
        result = self.session.generate(
            messages,
            images,
            max_new_tokens=options.get("max_new_tokens"),
            sampling=self._sampling(options),
            stop=stop_strings(options),
            keep_scale=self._keep_scale,
            max_pixels=self._max_pixels,
        )
        return GenerationResult(result.text.strip(), TokenCounts(input_tokens=result.prompt_tokens, output_tokens=len(result.token_ids)))

    def _sampling(self, options: Mapping[str, Any]) -> SamplingParams:
        temperature = options.get("temperature") or 0.0
        if temperature == 0:  # tasks then say top_p 0 or 1 alike
            return SamplingParams()
        top_k, top_p = options.get("top_k") or 0, options.get("top_p")
        self._next_seed += 1
        return SamplingParams(temperature, top_k, 1.0 if top_p is None else top_p, self._next_seed - 1)


def split_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[ImageSource]]:
    """lmms-eval's messages as a session takes them, and their images in order.

    Raises:
        EngineError: video or sound.
    """
    texts, images = [], []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            texts.append({"role": message["role"], "content": content})
            continue
        parts = []
        for part in content:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                parts.append({"type": "image"})
                images.append(part["url"])  # a Pillow image or a path
            else:
                raise EngineError(f"a message holds {part['type']}; engines take text and images, so choose another task")
        texts.append({"role": message["role"], "content": parts})
    return texts, images


def stop_strings(options: Mapping[str, Any]) -> list[str]:
    """The task's ``until``: a string, a list, or nothing; empty strings stop nothing."""
    until = options.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]
