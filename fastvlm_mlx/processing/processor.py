"""The processor of a model: pictures to pixels, conversation to token ids.

It is also an image processor in mlx-lm's sense (`image_token`, `from_config`, a call that expands
each `<image>` of a prompt), so mlx-lm's own command line and server take pictures with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ..config import ModelConfig
from ..errors import PromptError
from .geometry import Aspect, PictureProcessor
from .pictures import open_picture
from .prompt import IMAGE_MARK, Message, as_messages, chat_style


@dataclass
class Prompt:
    """What the language model is given: ids with the picture's id at every visual token."""

    text: str  # with one `<image>` a picture
    token_ids: list[int]
    visual_tokens: int


@dataclass
class Processor:
    """Everything between a user's question and the model's inputs."""

    config: ModelConfig
    pictures: PictureProcessor
    tokenizer: Any = field(default=None, repr=False)  # mlx_lm's TokenizerWrapper

    image_token: ClassVar[str] = IMAGE_MARK

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Processor:
        """mlx-lm's constructor: pictures only, the prompt's text is mlx-lm's business."""
        model_config = ModelConfig.from_dict(config)
        return cls(model_config, picture_processor(model_config, {}))

    def __call__(self, text: str, *, images: Sequence[Any]) -> tuple[str, list[mx.array]]:
        """mlx-lm's call: `text` with each mark repeated once a visual token; (H, W, 3) pixels."""
        parts = text.split(IMAGE_MARK)
        if len(parts) - 1 != len(images):
            raise PromptError(
                f"the text has {len(parts) - 1} {IMAGE_MARK} for {len(images)} pictures"
            )
        pixels = self.pixels(images)
        expanded = parts[0]
        for picture, part in zip(pixels, parts[1:], strict=True):
            expanded += IMAGE_MARK * self.visual_tokens(picture) + part
        return expanded, [mx.array(picture) for picture in pixels]

    def pixels(self, images: Sequence[Any]) -> list[np.ndarray]:
        """(H, W, 3) float32 a picture, from anything that `open_picture` takes."""
        return [self.pictures.one(open_picture(image)) for image in images]

    def visual_tokens(self, pixels: np.ndarray | mx.array) -> int:
        """Visual tokens of one picture's pixels (H, W, 3)."""
        rows, columns = self.config.vision.grid(pixels.shape[0], pixels.shape[1])
        return rows * columns

    def prompt(
        self,
        prompt: str | Sequence[Message],
        visual_tokens: Sequence[int] = (),
        *,
        system: str | None = None,
    ) -> Prompt:
        """Token ids of a conversation in which picture i takes `visual_tokens[i]` places.

        Raises:
            PromptError: marks and pictures differ, or the prompt is longer than the model's limit.
        """
        style = chat_style(self.config.text["model_type"])
        messages = as_messages(prompt, len(visual_tokens), system, style)
        text = style.render(messages)
        ids: list[int] = []
        # Each side of a mark is tokenised on its own, as the reference does.
        for i, part in enumerate(text.split(IMAGE_MARK)):
            if i:
                ids += [self.config.image_token_id] * visual_tokens[i - 1]
            if part:
                ids += self.tokenizer.encode(part, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        if bos is not None and self.config.text["model_type"] in ("llama", "mistral"):
            ids.insert(0, bos)
        if len(ids) >= self.config.max_length:
            raise PromptError(
                f"the prompt is {len(ids)} tokens long, {sum(visual_tokens)} of them pictures; "
                f"this model takes fewer than {self.config.max_length}"
            )
        return Prompt(text, ids, sum(visual_tokens))


def picture_processor(config: ModelConfig, settings: dict[str, Any]) -> PictureProcessor:
    """How this model wants its pictures, from its processor file's settings (or {}) and its config.

    Tiles (`anyres`) are a way of looking, not of preparing one picture: a picture is padded.
    """
    size = config.vision.image_size
    defaults = {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
    }
    aspect: Aspect = "crop" if config.aspect == "crop" else "pad"
    return PictureProcessor.from_config({**defaults, **settings}, config.raw, aspect=aspect)
