"""Compose the pictures in `examples/` from freely redistributable drawings and fonts.

    python make_examples.py ../examples

Everything is drawn from Debian's openclipart-png (public domain), fonts-noto-color-emoji (SIL
Open Font License 1.1) and DejaVu fonts, at the sizes a person's own pictures may have.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scenes import _FONT_ROOT, _shape_points
from sprites import CLIPART_ROOT, EMOJI_FONT

_SEED = 2024


def _clipart(path: str, longest: int) -> Image.Image:
    image = Image.open(CLIPART_ROOT / path).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    scale = longest / max(image.size)
    return image.resize([round(s * scale) for s in image.size], Image.Resampling.LANCZOS)


def _emoji(character: str, longest: int) -> Image.Image:
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    font = ImageFont.truetype(str(EMOJI_FONT), 109)
    ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
    image = canvas.crop(canvas.getchannel("A").getbbox())
    scale = longest / max(image.size)
    return image.resize([round(s * scale) for s in image.size], Image.Resampling.BICUBIC)


def _ground(rng: np.random.Generator, size: tuple[int, int], rgb: tuple[int, ...]) -> Image.Image:
    """A plain ground with a little light and grain, as in a photo of a sheet of paper."""
    width, height = size
    light = np.linspace(1.03, 0.95, height)[:, None, None] * np.ones((1, width, 1))
    pixels = np.array(rgb)[None, None, :] * light + rng.normal(0, 2.5, (height, width, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _paste(image: Image.Image, layer: Image.Image, x: float, y: float) -> None:
    """Paste centred at a fraction of the picture."""
    corner = (round(x * image.width - layer.width / 2), round(y * image.height - layer.height / 2))
    image.paste(layer, corner, layer)


def _word(image: Image.Image, text: str, points: int, rgb: tuple[int, ...], tilt: float) -> None:
    font = ImageFont.truetype(str(_FONT_ROOT / "dejavu/DejaVuSans-Bold.ttf"), points)
    left, top, right, bottom = font.getbbox(text)
    mask = Image.new("L", (right - left + 8, bottom - top + 8), 0)
    ImageDraw.Draw(mask).text((4 - left, 4 - top), text, font=font, fill=255)
    mask = mask.rotate(tilt, Image.Resampling.BICUBIC, expand=True)
    corner = ((image.width - mask.width) // 2, (image.height - mask.height) // 2)
    image.paste(rgb, corner, mask)


def _shape(name: str, side: int, rgb: tuple[int, ...]) -> Image.Image:
    layer = Image.new("RGBA", (2 * side, 2 * side), (*rgb, 0))
    points = [(side + x * side * 0.97, side + y * side * 0.97) for x, y in _shape_points(name)]
    ImageDraw.Draw(layer).polygon(points, fill=(*rgb, 255))
    return layer.resize((side, side), Image.Resampling.LANCZOS)


def make(folder: Path) -> None:
    """Write all the example pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(_SEED)

    cat = _ground(rng, (512, 512), (120, 178, 232))
    _paste(cat, _emoji("🐈", 400), 0.5, 0.52)
    cat.filter(ImageFilter.GaussianBlur(0.8)).save(folder / "cat.jpg", quality=90)

    shapes = _ground(rng, (480, 480), (250, 250, 250))
    for x, y in ((0.22, 0.3), (0.68, 0.24), (0.46, 0.72)):
        _paste(shapes, _shape("circle", 120, (214, 32, 38)), x, y)
    shapes.save(folder / "shapes.png")

    word = _ground(rng, (480, 480), (252, 222, 60))
    _word(word, "RIVER", 124, (20, 20, 24), 0.0)
    word.save(folder / "word.png")

    fruit = _ground(rng, (512, 512), (250, 250, 248))
    _paste(fruit, _emoji("🍌", 210), 0.26, 0.5)
    _paste(fruit, _emoji("🍓", 190), 0.74, 0.5)
    fruit.save(folder / "fruit.jpg", quality=92)

    duck = _ground(rng, (480, 480), (250, 250, 250))
    _paste(duck, _clipart("recreation/toys/rubber_duck1_ganson.png", 340), 0.5, 0.5)
    duck.save(folder / "duck.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)


if __name__ == "__main__":
    main()
