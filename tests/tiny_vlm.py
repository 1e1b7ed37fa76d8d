"""A random Qwen2.5-VL of two layers, its processor, and small drawn images whose label only they show."""

import random
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from tests.conftest import THINGS, make_tokenizer


# Written for these tests, in Qwen's manner: a system turn of its own, contents that are texts or lists of parts.
TEMPLATE = """\
{% for message in messages %}\
{% if loop.first and message.role != 'system' %}<|im_start|>system
fine .<|im_end|>
{% endif %}\
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


class TinyProcessor(Qwen2_5_VLProcessor):
    """Qwen's processor without its part for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def make_processor(template: str | None = TEMPLATE) -> TinyProcessor:
    """One token per 8 x 8 pixels, at least 4 and at most 64."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.eos_token = "<|im_end|>"
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=16 * 16, max_pixels=64 * 64)
    return TinyProcessor(images, tokenizer, chat_template=template)


def make_model(processor: ProcessorMixin, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    import torch

    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            # With the usual 0.02, a model this small may never look at its image.
            "initializer_range": 0.06,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
            "initializer_range": 0.06,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def make_other(family: str) -> tuple[ProcessorMixin, PreTrainedModel]:
    """LLaVA, whose images are all of one size, and Idefics3 (SmolVLM), which cuts them into tiles."""
    import torch

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<image>", "<fake_token_around_image>", "<global-img>"]}
    )
    template = (
        "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
        "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, initializer_range=0.1, **small)
    image = tokenizer.convert_tokens_to_ids("<image>")
    if family == "llava":
        vision = CLIPVisionConfig(image_size=16, patch_size=8, **small)
        processor = LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=image)
        return processor, LlavaForConditionalGeneration(config).eval()
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer,
        image_seq_len=4,
        chat_template=template,
    )
    config = Idefics3Config(
        text_config=text,
        vision_config={"image_size": 32, "patch_size": 8, **small},
        image_token_id=image,
        scale_factor=2,
    )
    return processor, Idefics3ForConditionalGeneration(config).eval()


def draw(label: int, seed: int = 0, size: tuple[int, int] = (16, 16)) -> PIL.Image.Image:
    """A disc on white, red for label 0 and blue for label 1."""
    rng = random.Random(f"{label} {seed}")
    image = PIL.Image.new("RGB", size, (255, 255, 255))
    left, top = (rng.randint(1, side // 3) for side in size)
    box = (left, top, size[0] - rng.randint(2, size[0] // 4), size[1] - rng.randint(2, size[1] // 4))
    PIL.ImageDraw.Draw(image).ellipse(box, fill=((220, 20, 20), (20, 20, 220))[label])
    return image


def make_image_rows(count: int, seed: int = 0, size: tuple[int, int] = (16, 16)) -> list[dict]:
    """Rows whose texts say nothing about the label: only the colour of the picture does."""
    rng = random.Random(seed)
    return [
        {
            "image": draw(index % 2, 1000 * seed + index, size),
            "text": f"the {rng.choice(THINGS)} and the {rng.choice(THINGS)}",
            "label": index % 2,
        }
        for index in range(count)
    ]


def write_image_rows(folder: Path, count: int, name: str = "train.jsonl") -> list[dict]:
    """Write rows as Hateful Memes has them: JSON lines, and pictures in `img`."""
    import json

    (folder / "img").mkdir(exist_ok=True)
    rows = []
    for number, row in enumerate(make_image_rows(count)):
        row["image"].save(folder / "img" / f"{number:05d}.png")
        rows.append({"id": number, "img": f"img/{number:05d}.png", "label": row["label"], "text": row["text"]})
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows
