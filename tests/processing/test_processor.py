"""From a question and pictures to the model's inputs."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from PIL import Image

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import PictureError, PromptError
from fastvlm_mlx.loading import load_folder
from fastvlm_mlx.processing.processor import Processor

IMAGE = tiny.IM_END + 1
N = tiny.PICTURE_TOKENS


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return load_folder(tiny.write(tmp_path_factory.mktemp("tiny")))[1]


def encode(processor: Processor, text: str) -> list[int]:
    ids: list[int] = processor.tokenizer.encode(text, add_special_tokens=False)
    return ids


def test_ids_of_a_prompt(processor: Processor) -> None:
    """The special tokens are single ids, and the picture's id stands once a token."""
    made = processor.prompt("Hi", [N])
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    after = "\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert made.text == f"{before}<image>{after}"
    assert made.token_ids == [
        *encode(processor, before),
        *[IMAGE] * N,
        *encode(processor, after),
    ]
    assert made.token_ids[0] == tiny.IM_START
    assert made.token_ids.count(tiny.IM_END) == 2
    assert made.visual_tokens == N


def test_each_side_of_a_mark_is_tokenised_on_its_own(processor: Processor) -> None:
    """`c<image>at`: "cat" is a token of this tokenizer, but the picture keeps its letters apart."""
    made = processor.prompt("c<image>at\n\n<image>\n", [1, 2])
    ids = made.token_ids
    first = ids.index(IMAGE)
    assert processor.tokenizer.decode([ids[first - 1]]) == "c"
    assert processor.tokenizer.decode([ids[first + 1]]) == "at"
    assert encode(processor, "cat") != encode(processor, "c") + encode(processor, "at")
    pieces = made.text.split("<image>")
    expected = [
        *encode(processor, pieces[0]),
        *[IMAGE] * 1,
        *encode(processor, pieces[1]),
        *[IMAGE] * 2,
        *encode(processor, pieces[2]),
    ]
    assert ids == expected


def test_pictures_of_different_sizes(processor: Processor) -> None:
    made = processor.prompt("<image>a<image>b<image>", [1, 4, 2])
    runs = "".join("i" if t == IMAGE else "." for t in made.token_ids).replace(".", " ").split()
    assert [len(run) for run in runs] == [1, 4, 2]
    assert made.visual_tokens == 7


def test_text_alone(processor: Processor) -> None:
    made = processor.prompt("Hi")
    assert IMAGE not in made.token_ids and made.visual_tokens == 0


def test_too_long(processor: Processor) -> None:
    """Counted with its pictures expanded: 512 is this model's limit."""
    with pytest.raises(PromptError, match=r"600 of them pictures; this model takes fewer than 512"):
        processor.prompt("Hi", [600])
    with pytest.raises(PromptError, match="0 of them pictures"):
        processor.prompt("x" * 600)
    assert len(processor.prompt("Hi", [400]).token_ids) < 512


def test_marks_and_pictures_differ(processor: Processor) -> None:
    with pytest.raises(PromptError):
        processor.prompt("<image>", [])


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_beginning_of_text_where_the_family_has_one(
    processor: Processor, model_type: str
) -> None:
    text = {**processor.config.text, "model_type": model_type}
    other = replace(processor, config=replace(processor.config, text=text))
    processor.tokenizer._tokenizer.bos_token = "<|endoftext|>"
    try:
        assert other.prompt("Hi").token_ids[0] == tiny.ENDOFTEXT
        assert processor.prompt("Hi").token_ids[0] == tiny.IM_START
    finally:
        processor.tokenizer._tokenizer.bos_token = None


# Pixels -------------------------------------------------------------------------------------------


def picture(width: int = 96, height: int = 64) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_every_source_gives_the_same_pixels(processor: Processor, tmp_path: Path) -> None:
    image = picture()
    image.save(tmp_path / "a.png")
    data = io.BytesIO()
    image.save(data, "PNG")
    sources: list[Any] = [
        image,
        np.asarray(image),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        data.getvalue(),
    ]
    pixels = processor.pixels(sources)
    assert len(pixels) == len(sources)
    for one in pixels:
        assert one.shape == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3)
        assert one.dtype == np.float32
        assert np.array_equal(one, pixels[0])


def test_padding_is_black(processor: Processor) -> None:
    pixels = processor.pixels([picture(96, 48)])[0]
    assert np.abs(pixels[:28]).max() == np.abs(pixels[-28:]).max() == 0
    assert pixels[40:88].mean() > 0.3
    assert pixels.min() >= 0 and pixels.max() <= 1


def test_a_picture_on_its_side(processor: Processor) -> None:
    """EXIF orientation is applied, to a PIL picture too, and once only."""
    image = picture(96, 48)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    image.save(data, "PNG", exif=exif)
    upright = processor.pixels([image.rotate(-90, expand=True)])[0]
    assert np.array_equal(processor.pixels([data.getvalue()])[0], upright)
    assert np.array_equal(processor.pixels([Image.open(data)])[0], upright)


def test_no_picture(processor: Processor) -> None:
    assert processor.pixels([]) == []
    with pytest.raises(PictureError):
        processor.pixels(["no such file.png"])


@pytest.mark.parametrize(("size", "tokens"), [((128, 128), 4), ((64, 192), 3)])
def test_visual_tokens(processor: Processor, size: tuple[int, int], tokens: int) -> None:
    assert processor.visual_tokens(np.zeros((*size, 3))) == tokens
    assert processor.visual_tokens(mx.zeros((*size, 3))) == tokens


# mlx-lm's interface -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare() -> Processor:
    """As mlx-lm makes it: from the configuration alone, without a tokenizer."""
    return Processor.from_config(tiny.llava_config())


def test_expansion(bare: Processor, processor: Processor) -> None:
    images = [np.asarray(picture()), np.asarray(picture(30, 70))]
    text, pixels = bare("a <image> b <image> c", images=images)
    marks = "<image>" * N
    assert text == f"a {marks} b {marks} c"
    assert [p.shape for p in pixels] == [(128, 128, 3)] * 2
    for ours, theirs in zip(pixels, processor.pixels(images), strict=True):
        assert np.array_equal(np.array(ours), theirs)


def test_expansion_of_nothing(bare: Processor) -> None:
    assert bare("text", images=[]) == ("text", [])


@pytest.mark.parametrize(("text", "count"), [("a", 1), ("<image>", 0), ("<image><image>", 1)])
def test_expansion_that_cannot_be(bare: Processor, text: str, count: int) -> None:
    with pytest.raises(PromptError):
        bare(text, images=[np.asarray(picture())] * count)


def test_settings_are_the_released_encoders(bare: Processor) -> None:
    assert bare.image_token == "<image>"
    assert bare.pictures.output_size == (128, 128)
    assert (bare.pictures.mean, bare.pictures.std) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(("value", "aspect"), [("pad", "pad"), (None, "crop"), ("anyres", "pad")])
def test_aspect(value: str | None, aspect: str) -> None:
    config = {**tiny.llava_config(), "image_aspect_ratio": value}
    made = Processor.from_config({k: v for k, v in config.items() if v is not None})
    assert made.pictures.aspect == aspect
    assert ModelConfig.from_dict(config).aspect == (value or "crop")
