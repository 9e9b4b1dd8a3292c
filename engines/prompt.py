"""Prompts: messages, the checkpoint's chat template and tokenizer, and image placeholders turned into visual tokens.

Messages have Hugging Face's form: ``{"role": …, "content": text or a list of {"type": "image"} and {"type": "text", "text": …}}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from .errors import EngineError
from .manifest import TokenIds

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Prompt", "PromptEncoder", "PromptError", "expand_image_tokens", "image_messages", "render_prompt"]

ROLES = ("system", "user", "assistant")
MAX_TEXT_CHARACTERS = 1 << 20  # more than any context holds: tokenizing megabytes only to refuse them would be an attack that works

Prompt = str | Sequence[Mapping[str, Any]]


class PromptError(EngineError):
    """A prompt that cannot be used; the message says what to change."""


class PromptEncoder:
    """Messages to token ids, with one image token for each image.

    ``tokenizer_path`` and ``template_path`` are the checkpoint's tokenizer.json and chat_template.jinja.
    """

    def __init__(self, tokenizer_path: Path, template_path: Path, tokens: TokenIds) -> None:
        try:
            self._template = template_path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EngineError(f"{template_path}: cannot be read ({error}); build the engine again") from None
        self.tokenizer = load_tokenizer(tokenizer_path)
        self._image_token = tokens.image
        self._reserved = _reserved_tokens(self.tokenizer, self._template, tokens)

    def render(self, prompt: Prompt, images: int) -> str:
        """Text of a prompt, ready for the answer. Arguments as :meth:`encode`.

        Raises:
            PromptError: malformed messages, more than ``MAX_TEXT_CHARACTERS``, or a text that holds tokens which structure prompts.
        """
        messages = image_messages(prompt, images) if isinstance(prompt, str) else check_messages(prompt)
        texts = [_text(message) for message in messages]
        if (characters := sum(map(len, texts))) > MAX_TEXT_CHARACTERS:
            raise PromptError(f"prompt has {characters:,} characters of text; at most {MAX_TEXT_CHARACTERS:,} are taken")
        for message, text in zip(messages, texts, strict=True):
            self._check_text(message["role"], text)
        return render_prompt(self._template, messages)

    def encode(self, prompt: Prompt, images: int) -> list[int]:
        """Token ids of a prompt, ready for the answer.

        Args:
            prompt: messages, or the text of one user message that all ``images`` images precede.
            images: number of images; the messages must have as many placeholders.

        Raises:
            PromptError: as :meth:`render`, or another number of placeholders.
        """
        token_ids = self._token_ids(self.render(prompt, images))
        placeholders = token_ids.count(self._image_token)
        if placeholders != images:
            raise PromptError(f"prompt has {placeholders} image placeholders, {images} images were given; give as many of the one as of the other")
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def _check_text(self, role: str, text: str) -> None:
        if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise PromptError(f"text of the {role} message holds half a surrogate pair, which is no character; remove it from the text")
        for token in self._token_ids(text):  # encoded, because a normalizer can make a special token of other letters
            if token in self._reserved:
                raise PromptError(f"text of the {role} message holds {self._reserved[token]}, which structures prompts; remove it from the text")

    def _token_ids(self, text: str) -> list[int]:
        # As a batch: ``encode`` of one text holds Python's lock, and every other thread waits for a long one.
        token_ids: list[int] = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return token_ids


def _text(message: Mapping[str, Any]) -> str:
    """A message's parts joined, because two harmless ones can make a special token."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, and switch off any truncation or padding that it brings.

    Raises:
        EngineError: the package is missing, or the file cannot be read.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise EngineError("the tokenizers package is missing; pip install tokenizers") from None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path}: cannot be read ({error}); build the engine again") from None
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the package raises nothing more exact
        raise EngineError(
            f"{path}: the installed tokenizers package cannot read it ({error}); upgrade the package, or build the engine again"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def image_messages(text: str, images: int) -> list[dict[str, Any]]:
    """One user message: ``images`` image placeholders, then the text."""
    return [{"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}]


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Check messages field by field; an unknown field is refused rather than left out of the prompt.

    Raises:
        PromptError: says which message, and what to change.
    """
    if not isinstance(messages, Sequence) or not messages:
        raise PromptError("messages must be a list of at least one message")
    return [_check_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def render_prompt(template: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Render a chat template as Hugging Face's ``apply_chat_template(add_generation_prompt=True)`` does.

    Raises:
        PromptError: the template is not valid, or it refuses the messages.
    """
    # Sandboxed: the template comes with the checkpoint, so it is somebody else's code.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True)
    except TemplateError as error:
        raise PromptError(f"the chat template does not take these messages ({error}); change the messages") from None


def expand_image_tokens(token_ids: Sequence[int], counts: Sequence[int], *, image_token: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Replace each image's placeholder by as many image tokens as it has survivors.

    Args:
        token_ids: with one ``image_token`` for each entry of ``counts``.
        counts: surviving visual tokens of each image, in prompt order.

    Returns:
        ``input_ids`` int64 [S] and ``visual_positions`` int64 [V], the columns of the image tokens.

    Raises:
        PromptError: the placeholders are not as many as the counts.
    """
    tokens = np.asarray(token_ids, np.int64)
    is_image = tokens == image_token
    if int(is_image.sum()) != len(counts):
        raise PromptError(
            f"prompt has {int(is_image.sum())} image placeholders, {len(counts)} images were given; give as many of the one as of the other"
        )
    repeats = np.ones(tokens.size, np.int64)
    repeats[is_image] = counts
    input_ids = np.repeat(tokens, repeats)
    return input_ids, np.flatnonzero(input_ids == image_token).astype(np.int64)


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise PromptError(f'{where} must be an object with "role" and "content" and nothing else')
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise PromptError(f"{where}: unknown role {role!r}; use one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, Sequence):
        raise PromptError(f"{where}: content must be text or a list of parts")
    return {"role": role, "content": [_check_part(part, f"{where}.content[{number}]") for number, part in enumerate(content)]}


def _check_part(part: Any, where: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        if set(part) != {"type"}:
            raise PromptError(f'{where} must be {{"type": "image"}} alone; pass the image itself beside the messages, in their order')
        return {"type": "image"}
    if kind == "text":
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PromptError(f'{where} must be {{"type": "text", "text": "..."}}')
        return {"type": "text", "text": part["text"]}
    raise PromptError(f'{where}: type must be "image" or "text", got {kind!r}')


def _reserved_tokens(tokenizer: Tokenizer, template: str, tokens: TokenIds) -> dict[int, str]:
    """Special tokens that structure a prompt: those of the chat template and of the manifest.

    Not all special tokens: Qwen2-VL's <|box_start|> and the like are what users write to point at things.
    """
    own = {tokens.image, tokens.vision_start, tokens.vision_end, *tokens.stop}
    added = tokenizer.get_added_tokens_decoder()
    return {number: token.content for number, token in added.items() if number in own or (token.special and token.content in template)}


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """jinja2's own filter escapes HTML; Hugging Face's, like this one, does not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
