"""Requests and responses of OpenAI's chat completions, as far as an engine has them.

A field that would change the answer and that engines do not have is taken at its neutral value alone; an unknown field is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from ..text_stream import MAX_STOP_CHARACTERS, MAX_STOPS

__all__ = [
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatCompletionRequest",
    "Choice",
    "ChunkChoice",
    "Delta",
    "ErrorBody",
    "ErrorDetail",
    "Health",
    "ImagePart",
    "Message",
    "ModelCard",
    "ModelList",
    "TextPart",
    "Usage",
    "Visual",
]

LARGEST = 2**63 - 1


def _must_be_false(value: bool) -> bool:
    if value:
        raise ValueError("must be false: this server does not have it")
    return value


No = Annotated[bool, AfterValidator(_must_be_false), WithJsonSchema({"type": "boolean", "const": False})]  # Literal[False] would take 0.0 as well


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where a picture is: a ``data:`` URL, or ``https`` where the server allows the host."""

    url: str
    detail: Literal["auto", "high"] | None = None


class ImagePart(_Strict):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class SystemMessage(_Strict):
    """Instructions."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]


class UserMessage(_Strict):
    """What the user says and shows."""

    role: Literal["user"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class AssistantMessage(_Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: str | list[TextPart]


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    """Of a stream."""

    include_usage: bool | None = None


class TextFormat(_Strict):
    """The only format of an answer."""

    type: Literal["text"]


class VFlowOptions(_Strict):
    """What OpenAI's API has not: the visual budget of this request."""

    keep_scale: float = Field(default=1.0, gt=0, le=1, description="Share of the built visual budget that this request spends.")
    max_pixels: int | None = Field(default=None, ge=1, le=LARGEST, description="Images are scaled down to this many pixels.")
    top_k: int = Field(default=0, ge=0, le=LARGEST, description="Sample from the k likeliest tokens; 0 from all.")


class ChatCompletionRequest(_Strict):
    """``POST /v1/chat/completions``."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=LARGEST, description="Longest answer; 256 or what fits where nothing is said.")
    max_tokens: int | None = Field(default=None, ge=1, le=LARGEST, description="The older name.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0, the default here, is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, le=LARGEST, description="Makes sampling repeatable.")
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(default=None, description="With ``stream`` only.")
    vflow: VFlowOptions | None = None
    # At their neutral values.
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    logprobs: No | None = None
    top_logprobs: None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1)] | None = None
    # They do not change the answer.
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    store: No | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> ChatCompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options need stream: true")
        return self

    @property
    def longest(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class Usage(BaseModel):
    """Tokens of a request; visual tokens count as far as they have entered the language model."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class StageCount(BaseModel):
    """Visual tokens of the request that a stage has kept."""

    part: str
    layer: int
    kept: int


class Visual(BaseModel):
    """What pruning did to this request, and how long it took."""

    visual_tokens: int = Field(description="Of all images, before pruning.")
    visual_tokens_kept: int = Field(description="After the last stage.")
    stages: list[StageCount]
    ttft_s: float = Field(description="Seconds from the request to the first token.")
    tokens_per_s: float | None


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The only choice."""

    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    vflow: Visual


class Delta(BaseModel):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The only choice, in part."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatCompletionChunk(BaseModel):
    """An event of a stream; the last one but usage holds ``finish_reason`` and ``vflow``."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    vflow: Visual | None = None


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["vflow-export"] = "vflow-export"


class ModelList(BaseModel):
    """``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """``GET /health``."""

    status: Literal["ready", "draining"]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorDetail
