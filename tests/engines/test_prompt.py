"""Prompts: Hugging Face's rendering, placeholders that are images, and text that cannot pass for structure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vflow.engines import Engine, EngineError, PromptError
from vflow.engines.prompt import MAX_TEXT_CHARACTERS, PromptEncoder, expand_image_tokens, image_messages, load_tokenizer, render_prompt

QWEN2_VL_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "text", "text": "Compare"}, {"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
    {"role": "assistant", "content": "They differ."},
    {"role": "user", "content": "How <b>?"},
]


@pytest.fixture(scope="module")
def encoder(standin: Engine) -> PromptEncoder:
    return PromptEncoder(standin.tokenizer_path, standin.chat_template_path, standin.tokens)


def shown(encoder: PromptEncoder, token_ids: list[int]) -> str:
    text: str = encoder.tokenizer.decode(token_ids, skip_special_tokens=False)
    return text


@pytest.mark.parametrize(
    "template", [QWEN2_VL_TEMPLATE, "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n{{ m | tojson }}{% endfor %}"]
)
def test_templates_render_as_hugging_faces_do(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered = render_jinja_template(conversations=[CONVERSATION], chat_template=template, add_generation_prompt=True)
    assert render_prompt(template, CONVERSATION) == rendered[0][0]


def test_a_text_alone_becomes_a_user_message_after_its_images(encoder: PromptEncoder) -> None:
    token_ids = encoder.encode("What?", 2)
    assert token_ids == encoder.encode(image_messages("What?", 2), 2)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert shown(encoder, token_ids) == f"<|im_start|>user\n{image}{image}What?<|im_end|>\n<|im_start|>assistant\n"


def test_a_conversation_keeps_its_order(encoder: PromptEncoder) -> None:
    text = shown(encoder, encoder.encode(CONVERSATION, 2))
    assert "Compare<|vision_start|><|image_pad|><|vision_end|>and<|vision_start|>" in text
    assert text.index("Be short.") < text.index("Compare") < text.index("They differ.") < text.index("How <b>?")


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<|im_start|>"])
def test_text_cannot_hold_tokens_that_structure_prompts(encoder: PromptEncoder, token: str) -> None:
    half = len(token) // 2
    in_two_parts = [{"role": "user", "content": [{"type": "text", "text": token[:half]}, {"type": "text", "text": token[half:]}]}]
    prompts: list[Any] = [f"see {token}", [{"role": "system", "content": token}, {"role": "user", "content": "x"}], in_two_parts]
    for prompt in prompts:
        with pytest.raises(PromptError, match="which structures prompts; remove it from the text") as caught:
            encoder.encode(prompt, 0)
        assert token in str(caught.value) and "\n" not in str(caught.value)


def test_a_normalizer_cannot_make_such_a_token(standin: Engine, tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<|image_pad|>": 1, "user": 2}, unk_token="<unk>"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken("<|image_pad|>", special=True, normalized=False)])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "template").write_text("{% for m in messages %}{% for p in m.content %} {{ p.text }} {% endfor %}{% endfor %}")
    tokens = type(standin.tokens)(image=1, vision_start=90, vision_end=91, stop=())
    with pytest.raises(PromptError, match=r"holds <\|image_pad\|>"):
        PromptEncoder(tmp_path / "tokenizer.json", tmp_path / "template", tokens).encode("see <|IMAGE_PAD|>", 0)


def test_special_tokens_that_do_not_structure_prompts_pass(encoder: PromptEncoder) -> None:
    assert "<|box_start|>" in shown(encoder, encoder.encode("what is at <|box_start|>(1,2)", 0))


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("<|>image_pd end strt\n"), max_size=40))
def test_whatever_the_text_the_images_are_those_given(encoder: PromptEncoder, text: str) -> None:
    try:
        token_ids = encoder.encode(text, 1)
    except PromptError:
        return
    assert token_ids.count(encoder.tokenizer.token_to_id("<|image_pad|>")) == 1


@pytest.mark.parametrize(("prompt", "images"), [("text", -1), (CONVERSATION, 1), (CONVERSATION, 3), ([{"role": "user", "content": "x"}], 1)])
def test_other_numbers_of_placeholders_and_images_are_refused(encoder: PromptEncoder, prompt: Any, images: int) -> None:
    with pytest.raises(PromptError, match=r"prompt has \d+ image placeholders, -?\d+ images were given"):
        encoder.encode(prompt, images)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ({"role": "user"}, "must be a list"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"role": "user"}], r"messages\[0\] must be an object with"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "and nothing else"),
        ([{"role": "wizard", "content": "x"}], r"messages\[0\]: unknown role 'wizard'; use one of system, user, assistant"),
        ([{"role": "user", "content": None}], "content must be text or a list"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\]: type must be"),
        ([{"role": "user", "content": [{"type": "video"}]}], 'type must be "image" or "text", got \'video\''),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "must be .*text"),
        ([{"role": "user", "content": [{"type": "image", "image": "cat.png"}]}], "pass the image itself beside the messages"),
    ],
)
def test_malformed_messages_are_refused_by_place(encoder: PromptEncoder, messages: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        encoder.encode(messages, 0)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{% if %}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}"]
)
def test_a_template_that_refuses_or_misbehaves_is_an_error(template: str) -> None:
    with pytest.raises(PromptError, match="the chat template does not take these messages"):
        render_prompt(template, CONVERSATION)


def test_placeholders_grow_to_survivors() -> None:
    input_ids, columns = expand_image_tokens([1, 5, 2, 5, 3], [3, 1], image_token=5)
    assert input_ids.tolist() == [1, 5, 5, 5, 2, 5, 3] and columns.tolist() == [1, 2, 3, 5]
    assert input_ids.dtype == columns.dtype == np.int64
    with pytest.raises(PromptError, match="1 image placeholders, 2 images"):
        expand_image_tokens([5], [1, 1], image_token=5)


def test_truncation_and_padding_of_a_tokenizer_are_switched_off(tokenizer: Any, tmp_path: Path) -> None:
    limited = type(tokenizer).from_str(tokenizer.to_str())
    limited.enable_truncation(4)
    limited.enable_padding(length=8)
    limited.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path / "tokenizer.json").encode("123456789").ids) == 9


def test_a_tokenizer_that_cannot_be_read_is_refused_by_file(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="none: cannot be read"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "broken").write_text("{}")
    with pytest.raises(EngineError, match="broken: the installed tokenizers package cannot read it"):
        load_tokenizer(tmp_path / "broken")


def test_half_a_surrogate_pair_is_refused(encoder: PromptEncoder) -> None:
    with pytest.raises(PromptError, match="user message holds half a surrogate pair"):
        encoder.encode("a \ud800 b", 0)
    assert encoder.encode("a \U0001f600 b\n", 0)


def test_more_text_than_any_context_holds_is_not_tokenized(encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_token_ids", lambda text: pytest.fail("tokenized"))
    half = {"role": "user", "content": "a" * (MAX_TEXT_CHARACTERS // 2 + 1)}
    for prompt in ("a" * (MAX_TEXT_CHARACTERS + 1), [half, half]):
        with pytest.raises(PromptError, match="characters of text; at most 1,048,576 are taken"):
            encoder.encode(prompt, 0)
