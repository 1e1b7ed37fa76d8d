"""What requests may hold: OpenAI's fields as far as they are kept, and vLLM's `classify`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


# What clients write into a field by which they mean nothing.
_EMPTY = (None, [], {})
# Of a part of a text; what else it holds is for servers that keep it.
_OF_A_PART = {"type", "text", "annotations", "cache_control"}
_MOST_STOPS = 4
_LONGEST_STOP = 256
# Rendering a conversation takes time for each turn, however short.
_MOST_TURNS = 1000


def _texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            "give a text or a list of texts. Token ids are not taken: they would pass by what keeps a text from "
            "writing control tokens"
        )
    if not texts:
        raise ValueError("the list is empty. Give at least one text")
    if blank := next((row for row, text in enumerate(texts, 1) if not text.strip()), 0):
        raise ValueError(f"text {blank} of {len(texts)} is empty. Give each at least a word")
    return texts


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        raise ValueError("there is no text, as in an answer that was withheld. Leave that turn and its question out")
    if not isinstance(value, list):
        raise ValueError("give a text, or a list of text parts")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('each part must be {"type": "text", "text": ...}: this model reads text alone')
        if not part.keys() <= _OF_A_PART:
            raise ValueError("a text part has the fields `type` and `text` and no others")
    return "\n".join(part["text"] for part in value)


def _stops(value: Any) -> list[str]:
    stops = [] if value in (None, "") else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("give a text or a list of texts")
    if len(stops) > _MOST_STOPS or not all(0 < len(stop) <= _LONGEST_STOP for stop in stops):
        raise ValueError(f"give at most {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters")
    return stops


Texts = Annotated[list[str], BeforeValidator(_texts, json_schema_input_type=str | list[str])]
Content = Annotated[str, BeforeValidator(_content, json_schema_input_type=str | list[dict[str, str]])]
Stops = Annotated[list[str], BeforeValidator(_stops, json_schema_input_type=str | list[str] | None)]
Ignored = Annotated[Any, Field(description="Accepted and ignored.")]
# Penalties change what the model writes, and it was measured without.
Zero = Annotated[float, Field(ge=0, le=0)] | None


class Strict(BaseModel):
    """Base of all: no field that is not known, no value of another type than the one that is asked for."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: held for name, held in value.items() if name in cls.model_fields or held not in _EMPTY}


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Ignored = None


class StreamOptions(Strict):
    """What a stream holds beside the answer."""

    include_usage: bool | None = False
    include_obfuscation: Ignored = None


class TextFormat(Strict):
    """The one format that answers have."""

    type: Literal["text"]


class Asked(Strict):
    """Fields of every request."""

    model: str = Field(description="Name of the model, as `/v1/models` has it.")
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None


class ClassifyRequest(Asked):
    """`/v1/classify`: texts that get a class each."""

    input: Texts = Field(description="A text, or a list of texts.")


class WrittenRequest(Asked):
    """What chat and plain completions share. Where classes are chosen, nothing of it changes the answer."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0 by default, not 1: greedy answers are those that the model was measured with."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Literal[1] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None, description="0 by default: the same request gets the same answer."
    )
    stop: Stops = []
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "WrittenRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs `stream: true`")
        return self


class ChatRequest(WrittenRequest):
    """`/v1/chat/completions`: a conversation that ends in a question."""

    messages: list[Message] = Field(min_length=1, max_length=_MOST_TURNS)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tool_choice: Literal["none", "auto"] | None = Field(None, description="Accepted: there are no tools.")
    parallel_tool_calls: bool | None = Field(None, description="Accepted: there are no tools.")


class CompletionRequest(WrittenRequest):
    """`/v1/completions`: texts that are answered one by one."""

    prompt: Texts = Field(description="A text, or a list of texts; one of them if it is streamed.")
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _one_stream(self) -> "CompletionRequest":
        if self.stream and len(self.prompt) > 1:
            raise ValueError("a stream has one `prompt`. Send the others as requests of their own")
        return self
