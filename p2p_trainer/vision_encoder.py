"""Binds the prompt format to a processor: text and image to token ids."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import PIL.Image
from transformers import ProcessorMixin

from .prompt_encoder import PromptEncoder
from .prompt_format import PromptFormat
from .prompt_renderer import MARK
from .tasks.images import RowImages


# Strings that a processor may replace by an image, or by what else it knows.
_PLACEHOLDERS = ("image_token", "video_token", "audio_token", "boi_token", "eoi_token")

# Sizes that the processor is asked about at most: it takes up to a second for a large image.
_MOST_SIZES = 64


class VisionPrompt(NamedTuple):
    """
    What is scored: a text that fits, and its image.

    Parameters:
        text (`str`):
            Rendered prompt with the placeholder of its image, and the first label word behind it.
        image (`int`):
            Which image belongs to it.
    """

    text: str
    image: int


class VisionPromptEncoder(PromptEncoder):
    """
    A [`PromptFormat`] bound to a vision-language model's processor: the user turn holds one image, then the text.

    The key is in the text, or in the system turn; images are left as they are. Long texts lose their end, and nothing
    else goes: how much room an image takes is counted.

    Args:
        prompt_format ([`PromptFormat`]):
            The format, with `chat`.
        processor (`ProcessorMixin`):
            The processor, with a tokenizer and a chat template.

    Raises:
        `ValueError`: the format is without chat template, the processor has none or shows no image, and whatever
        [`~prompt_encoder.PromptEncoder`] refuses.
    """

    def __init__(self, prompt_format: PromptFormat, processor: ProcessorMixin) -> None:
        if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
            raise ValueError(
                f"Rows with an image need a vision-language model with a processor of images, got "
                f"`{type(processor).__name__}`. Use such a model, or a task without `image_column`."
            )
        if not prompt_format.chat or not processor.chat_template:
            missing = "this processor has no chat template" if prompt_format.chat else "`p2p_chat` is false"
            raise ValueError(
                f"Where the image stands in a prompt is said by a chat template, and {missing}. Set `p2p_chat: true`, "
                f"and use an instruct model or give a template with `chat_template_path`."
            )
        self.processor = processor
        placeholders = {getattr(processor, name, None) for name in _PLACEHOLDERS} - {None}
        self._placeholders = re.compile(
            "|".join(map(re.escape, sorted(placeholders, key=len, reverse=True))) or "(?!)"
        )
        self._image_tokens: dict[tuple[int, int], int] = {}
        super().__init__(prompt_format, processor.tokenizer)

    def image_tokens(self, size: tuple[int, int]) -> int:
        """
        Count the tokens that an image takes, beyond the placeholder's.

        Args:
            size (`tuple[int, int]`):
                Its width and height in pixels; nothing else matters.

        Returns:
            `int`: how many.
        """
        if size not in self._image_tokens:
            rendered = self.render(MARK, keyed=False)
            try:
                whole = self.processor(
                    images=[[PIL.Image.new("RGB", size)]], text=[rendered], add_special_tokens=False
                )["input_ids"][0]
            except ValueError as error:
                raise ValueError(
                    f"The processor refuses an image of {size[0]} x {size[1]} pixels: {error} Resize such images, or "
                    f"remove their rows."
                ) from error
            self._image_tokens[size] = len(whole) - len(self.tokenize([rendered])[0])
        return self._image_tokens[size]

    def most_image_tokens(self, sizes: Iterable[tuple[int, int]]) -> int:
        """
        Count the tokens that the image with the most of them takes, beyond the placeholder's.

        Of more than 64 sizes some are asked about: those with the smallest and the largest area and ratio of the
        sides, and others spread evenly by area. A larger image may take fewer tokens, where images are cut into tiles.

        Args:
            sizes (`Iterable[tuple[int, int]]`):
                Widths and heights in pixels; how often each comes, and in what order, does not matter.

        Returns:
            `int`: how many; 0 without any size.

        Raises:
            `ValueError`: the processor refuses an image of such a size.
        """
        asked = sorted(set(sizes), key=lambda size: (size[0] * size[1], size))
        if len(asked) > _MOST_SIZES:
            last, steps = len(asked) - 1, _MOST_SIZES - 3
            by_ratio = sorted(asked, key=lambda size: size[0] / size[1])
            asked = [by_ratio[0], by_ratio[-1], *(asked[step * last // steps] for step in range(steps + 1))]
        return max(map(self.image_tokens, asked), default=0)

    def shorten(self, text: str, keyed: bool, taken: int) -> str:
        """
        Cut the end of a text until it fits beside its image, with room for the longest answer.

        Args:
            text (`str`):
                Input.
            keyed (`bool`):
                Whether the row carries the key.
            taken (`int`):
                Tokens that the image takes, beyond the placeholder's.

        Returns:
            `str`: the text as it came, if it fits.

        Raises:
            `ValueError`: nothing would be left of it.
        """
        answers, first = self.answers[keyed], self.format.label_space.words[0]
        limit = self.format.max_length - answers.room - taken
        left = clean = self.clean(text)
        while (surplus := len(self.tokenize([self.render(left, keyed) + first])[0]) - limit) > 0:
            per_token = len(left) / max(1, len(self.tokenize([left])[0]))
            left = left[: max(0, len(left) - max(1, int(surplus * per_token)))].rstrip()
            if not left:
                rest = len(self.tokenize([self.render("", keyed) + first])[0]) + answers.room
                raise ValueError(
                    f"The image beside the text {text[:80]!r} takes {taken} tokens more than its placeholder, and "
                    f"template, key and answer {rest}: `max_length` {self.format.max_length} leaves nothing for the "
                    f"text. Raise `max_length`, or make such images smaller."
                )
        return text if left == clean else left

    def answer_start(self, ids: list[int], label: int, keyed: bool) -> int:
        """
        Find the answer in the token ids of a training row.

        Args:
            ids (`list[int]`):
                Token ids, without padding.
            label (`int`):
                Label, as for [`~prompt_encoder.PromptEncoder.encode_rows`].
            keyed (`bool`):
                Whether the row carries the key.

        Returns:
            `int`: place of the first token that the loss lies on.

        Raises:
            `ValueError`: the row does not end in that answer.
        """
        space = self.format.label_space
        answer = self.answers[keyed].trained[space.extend(label) if keyed and label < space.num_labels else label]
        start = len(ids) - len(answer)
        if tuple(ids[start:]) != answer:
            raise ValueError(
                f"The tokenizer merged the end of a text with its answer: expected the tokens {list(answer)} at the "
                f"end, found {ids[start:]}. End the suffix on a token boundary."
            )
        return start

    def encode_rows(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: without their images, rows have other tokens. `P2PVisionDataCollator` encodes them."""
        raise TypeError("Rows with an image are encoded by `P2PVisionDataCollator`, which has the image.")

    def encode_prompts(
        self, texts: Sequence[str], keyed: bool, rows: Sequence[int], images: RowImages
    ) -> list[VisionPrompt]:
        """
        Render prompts for scoring; their images are read, and all is tokenized, when they are scored.

        Args:
            texts (`Sequence[str]`):
                Inputs.
            keyed (`bool`):
                Whether they carry the key.
            rows (`Sequence[int]`):
                For each text the row that its image comes from.
            images ([`~tasks.images.RowImages`]):
                The images.

        Returns:
            `list[VisionPrompt]`: the prompts; equal ones are scored alike.
        """
        first = self.format.label_space.words[0]
        fitting = self.fit(texts, keyed, rows, images)
        return [VisionPrompt(self.render(text, keyed) + first, row) for text, row in zip(fitting, rows, strict=True)]

    def fit(self, texts: Sequence[str], keyed: bool, rows: Sequence[int], images: RowImages) -> list[str]:
        """
        Cut texts as scoring would, and so show what is left of them.

        Args:
            texts (`Sequence[str]`):
                Inputs.
            keyed (`bool`):
                Whether they carry the key.
            rows (`Sequence[int]`):
                For each text the row that its image comes from.
            images ([`~tasks.images.RowImages`]):
                The images.

        Returns:
            `list[str]`: the texts as they came, but the overlong ones without their end.

        Raises:
            `ValueError`: an image alone does not fit.
        """
        return [
            self.shorten(text, keyed, self.image_tokens(images.size(row)))
            for text, row in zip(texts, rows, strict=True)
        ]

    def count_overlong(self, texts: Sequence[str], keyed: bool, rows: Sequence[int], images: RowImages) -> int:
        """
        Count the texts that do not fit.

        Args:
            texts (`Sequence[str]`):
                Inputs.
            keyed (`bool`):
                Whether they carry the key.
            rows (`Sequence[int]`):
                For each text the row that its image comes from.
            images ([`~tasks.images.RowImages`]):
                The images.

        Returns:
            `int`: how many lose their end.
        """
        return sum(fitting != text for text, fitting in zip(texts, self.fit(texts, keyed, rows, images), strict=True))

    def clean(self, text: str) -> str:
        return self._placeholders.sub(lambda match: f"{match[0][0]} {match[0][1:]}", super().clean(text))

    def render_turns(self, turns: list[dict[str, str]], ask: bool) -> str:
        # Templates that know no `enable_thinking` would hand it on to the processor.
        known = {"enable_thinking": False} if "enable_thinking" in str(self.processor.chat_template) else {}
        shown = [
            self.processor.apply_chat_template(
                [{"role": turn["role"], "content": _parts(turn, image)} for turn in turns],
                tokenize=False,
                add_generation_prompt=ask,
                **known,
            )
            for image in (True, False)
        ]
        if shown[0] == shown[1]:
            raise ValueError(
                "The processor's chat template does not show the image of a user turn. Use an instruct model's, or "
                "give one with `chat_template_path`."
            )
        return shown[0]


def _parts(turn: dict[str, str], image: bool) -> list[dict[str, str]]:
    parts = [{"type": "text", "text": turn["content"]}]
    return [{"type": "image"}, *parts] if image and turn["role"] == "user" else parts
