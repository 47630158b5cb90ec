"""Pictures of the nouns: Noto colour emoji and curated clip art, as one file of RGBA sprites.

Sources (Debian packages): fonts-noto-color-emoji and openclipart-png. `clipart.tsv` lists which
drawing shows which noun and which drawings are held out of training altogether.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import vocabulary
from PIL import Image, ImageDraw, ImageFont

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLIPART_ROOT = Path("/usr/share/openclipart/png")
CLIPART_LIST = Path(__file__).with_name("clipart.tsv")
SPRITE_SIZE = 144  # longest side, pixels
_EMOJI_PIXELS = 109  # the one size of the bitmaps in Noto Color Emoji


@dataclass(frozen=True)
class Sprite:
    """One rendition of a noun. `pixels` is uint8 (h, w, 4), cropped to what is opaque."""

    name: str
    pixels: np.ndarray
    colour: str | None  # the colour's name where one colour clearly dominates
    held_out: bool
    source: str


def _trim(image: Image.Image) -> Image.Image | None:
    """Crop to the opaque part and shrink the longest side to `SPRITE_SIZE`."""
    box = image.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = SPRITE_SIZE / max(image.size)
    size = tuple(max(8, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def nearest_colours(rgb: np.ndarray) -> np.ndarray:
    """Index into `vocabulary.COLOURS` of the named colour of each row of `rgb` (n, 3) uint8."""
    from colorsys import rgb_to_hsv

    names = list(vocabulary.COLOURS)
    found = np.empty(len(rgb), dtype=np.int64)
    for i, (r, g, b) in enumerate(rgb / 255.0):
        h, s, v = rgb_to_hsv(r, g, b)
        hue = h * 360
        if v < 0.2:
            name = "black"
        elif s < 0.16:
            name = "white" if v > 0.88 else "black" if v < 0.28 else "grey"
        elif hue < 16 or hue >= 345:
            name = "pink" if s < 0.55 and v > 0.75 else "red" if s > 0.6 and v > 0.55 else "brown"
        elif hue < 42:
            name = "brown" if v < 0.72 else "orange" if s > 0.7 and v > 0.88 else "none"
        elif hue < 66:
            name = "yellow" if v > 0.7 and s > 0.35 else "none"
        elif hue < 165:
            name = "green"
        elif hue < 255:
            name = "blue" if s > 0.3 else "none"
        elif hue < 295:
            name = "purple"
        else:
            name = "pink" if v > 0.7 else "purple"
        found[i] = names.index(name) if name != "none" else -1
    return found


def dominant_colour(pixels: np.ndarray, share: float = 0.7) -> str | None:
    """Return the name of the colour that covers at least `share` of the sprite, if one does."""
    opaque = pixels[pixels[..., 3] > 128][:, :3]
    sample = opaque[:: max(1, len(opaque) // 400)]
    found = nearest_colours(sample)
    counts = np.bincount(found[found >= 0], minlength=len(vocabulary.COLOURS))
    best = int(counts.argmax())
    if counts[best] < share * len(sample):
        return None
    return list(vocabulary.COLOURS)[best]


def _render_emoji(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
    return _trim(canvas)


def build_sprites() -> list[Sprite]:
    """Render every noun of `vocabulary.OBJECTS` in every rendition there is."""
    Image.MAX_IMAGE_PIXELS = None
    font = ImageFont.truetype(str(EMOJI_FONT), _EMOJI_PIXELS)
    sprites = []

    def add(name: str, image: Image.Image | None, held_out: bool, source: str) -> None:
        if image is None:
            print(f"skipped {source}: empty", file=sys.stderr)
            return
        pixels = np.asarray(image)
        sprites.append(Sprite(name, pixels, dominant_colour(pixels), held_out, source))

    for name, emoji in vocabulary.OBJECTS.items():
        for character in emoji:
            add(name, _render_emoji(font, character), False, f"emoji {ord(character):X}")
    for line in CLIPART_LIST.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        name, split, path = line.split("\t")
        image = Image.open(CLIPART_ROOT / path)
        image.draft("RGB", (SPRITE_SIZE * 2, SPRITE_SIZE * 2))
        image.thumbnail((SPRITE_SIZE * 3, SPRITE_SIZE * 3))
        add(name, _trim(image.convert("RGBA")), split == "held-out", path)
    return sprites


def save_sprites(sprites: list[Sprite], path: Path) -> None:
    """Write all sprites to one .npz file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"pixels_{i}": sprite.pixels for i, sprite in enumerate(sprites)}
    rows = [[s.name, s.colour or "", str(int(s.held_out)), s.source] for s in sprites]
    np.savez(path, rows=np.array(rows), **arrays)


def load_sprites(path: Path) -> list[Sprite]:
    """Read what `save_sprites` wrote, building it first where it does not exist."""
    if not path.exists():
        save_sprites(build_sprites(), path)
    with np.load(path) as data:
        return [
            Sprite(name, data[f"pixels_{i}"], colour or None, held == "1", source)
            for i, (name, colour, held, source) in enumerate(data["rows"].tolist())
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Render the sprites into a cache file.")
    parser.add_argument("output", type=Path)
    path = parser.parse_args().output
    sprites = build_sprites()
    save_sprites(sprites, path)
    held = sum(s.held_out for s in sprites)
    names = len({s.name for s in sprites})
    print(f"{len(sprites)} sprites of {names} nouns, {held} held out, in {path}")


if __name__ == "__main__":
    main()
