"""Seeded composition of training pictures together with the facts that are true of them.

Co-ordinates of items are fractions of the picture's side: x to the right, y downwards.
"""

from __future__ import annotations

import io
import math
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import vocabulary
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sprites import Sprite

WORD_LIST = Path("/usr/share/dict/american-english")  # Debian package wamerican
_FONT_ROOT = Path("/usr/share/fonts/truetype")
FONTS: tuple[str, ...] = (
    "dejavu/DejaVuSans-Bold.ttf",
    "dejavu/DejaVuSans.ttf",
    "dejavu/DejaVuSansCondensed-Bold.ttf",
    "liberation/LiberationSans-Bold.ttf",
    "liberation/LiberationSans-Regular.ttf",
    "freefont/FreeSansBold.ttf",
)
_NARROW = ("dejavu/DejaVuSansCondensed-Bold.ttf", "liberation/LiberationSansNarrow-Bold.ttf")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
MIN_CAP_HEIGHT = 1 / 8  # of the picture's side
CAP_HEIGHTS = (0.17, 0.25)  # of the picture's side, as far as the word's width allows
MAX_TEXT_TILT = 3.0  # degrees
_HELD_OUT_WORDS = 10  # one word in this many never occurs in training


@dataclass
class Item:
    """One thing in the picture."""

    name: str
    is_shape: bool
    colour: str | None
    x: float
    y: float
    size: float


@dataclass
class Letter:
    """Centre and width of one letter of the text."""

    letter: str
    x: float
    y: float
    width: float


@dataclass
class Scene:
    """What is true of one picture. `items` of one name are one group."""

    background: str | None = None
    items: list[Item] = field(default_factory=list)
    text: str | None = None
    text_colour: str | None = None
    letters: list[Letter] = field(default_factory=list)

    def groups(self) -> list[list[Item]]:
        """Items of the same name and colour together, in reading order of their first item."""
        found: dict[tuple[str, str | None], list[Item]] = {}
        for item in self.items:
            found.setdefault((item.name, item.colour if item.is_shape else None), []).append(item)
        return list(found.values())


class SceneMaker:
    """Composes pictures of one size from sprites, shapes and words.

    `held_out` chooses which sprites and words are used: False for training, True for only those
    that training never sees.
    """

    def __init__(
        self,
        sprites: list[Sprite],
        size: int = 256,
        held_out: bool = False,
        held_out_words: bool | None = None,
    ) -> None:
        self.size = size
        self.cap_heights = CAP_HEIGHTS
        self.large_share = 0.5  # of the single things
        self.sprites: dict[str, list[Sprite]] = {}
        for sprite in sprites:
            if sprite.held_out == held_out:
                self.sprites.setdefault(sprite.name, []).append(sprite)
        self.names = sorted(self.sprites)
        self.words = dictionary_words(held_out if held_out_words is None else held_out_words)
        self.only_words = held_out if held_out_words is None else held_out_words

    def make(
        self, rng: np.random.Generator, kind: str | None = None, text_share: float = 0.45
    ) -> tuple[np.ndarray, Scene]:
        """Return a picture, uint8 (size, size, 3), and its facts.

        `kind` is one of object, shape, count, pair, word; by default drawn at random.
        """
        if kind is None:
            kind = str(
                rng.choice(
                    ["object", "shape", "count", "pair", "word"], p=[0.32, 0.12, 0.22, 0.14, 0.20]
                )
            )
        scene = Scene()
        image, avoid = self._background(rng, scene)
        area = (0.0, 0.0, 1.0, 1.0)
        if kind == "word":
            self._write(image, rng, scene, area, avoid)
        else:
            if rng.random() < text_share:
                band = rng.uniform(0.24, 0.38)
                top = rng.random() < 0.5
                text_area = (0.0, 0.0, 1.0, band) if top else (0.0, 1 - band, 1.0, 1.0)
                area = (0.0, band, 1.0, 1.0) if top else (0.0, 0.0, 1.0, 1 - band)
                self._write(image, rng, scene, text_area, avoid)
            self._place(image, rng, scene, kind, area, avoid)
        return self._degrade(image, rng), scene

    def tile(self, rng: np.random.Generator) -> tuple[np.ndarray, Scene]:
        """A small scene of a few letters or one thing."""
        scene = Scene()
        image, avoid = self._background(rng, scene)
        area = (0.0, 0.0, 1.0, 1.0)
        if rng.random() < 0.55:
            letters = rng.integers(len(LETTERS), size=rng.integers(1, 2 + self.size // 48))
            text = "".join(LETTERS[i] for i in letters)
            self._write(image, rng, scene, area, avoid, text)
        else:
            kind = "shape" if rng.random() < 0.15 else "object"
            self._place(image, rng, scene, kind, area, avoid)
        return self._degrade(image, rng), scene

    # -- background --------------------------------------------------------------------------

    def _background(
        self, rng: np.random.Generator, scene: Scene
    ) -> tuple[Image.Image, list[tuple[int, int, int]]]:
        """Return the empty picture and the colours that it consists of."""
        style = rng.random()
        side = self.size
        name = _pick_colour(rng, white=0.22)
        first = _shade(rng, name)
        if style < 0.5:
            scene.background = name
            return Image.new("RGB", (side, side), first), [first]
        if style < 0.68:  # a gradient within one named colour
            scene.background = name
            return _gradient(rng, side, _shade(rng, name), _shade(rng, name)), [first]
        second = _shade(rng, _pick_colour(rng))
        if style < 0.82:
            return _gradient(rng, side, first, second), [first, second]
        cells = int(rng.integers(2, 9))
        mix = rng.random((cells, cells, 1))
        grid = mix * np.array(first) + (1 - mix) * np.array(second)
        grid = np.clip(grid + rng.normal(0, 12, grid.shape), 0, 255).astype(np.uint8)
        resample = Image.Resampling.NEAREST if rng.random() < 0.3 else Image.Resampling.BICUBIC
        return Image.fromarray(grid).resize((side, side), resample), [first, second]

    # -- things ------------------------------------------------------------------------------

    def _place(
        self,
        image: Image.Image,
        rng: np.random.Generator,
        scene: Scene,
        kind: str,
        area: tuple[float, float, float, float],
        avoid: list[tuple[int, int, int]],
    ) -> None:
        _, y0, _, y1 = area
        height = y1 - y0
        if kind in ("object", "shape"):
            if rng.random() < self.large_share:  # large, near the middle of its area
                size = height * rng.uniform(0.66, 1.04)
                slack = 0.12
                x = rng.uniform(0.5 - slack, 0.5 + slack)
                y = (y0 + y1) / 2 + rng.uniform(-0.06, 0.06)
            else:  # small, anywhere
                size = min(rng.uniform(0.24, 0.5), height)
                x = rng.uniform(size * 0.42, 1 - size * 0.42)
                y = rng.uniform(y0 + size * 0.42, max(y0 + size * 0.43, y1 - size * 0.42))
            self._add(image, rng, scene, kind == "shape", [(x, y, size)], avoid)
            return
        if kind == "pair":
            size = min(rng.uniform(0.3, 0.5), 0.92 * height)
            spots = _spread(rng, 2, area, size)
            if spots is None:
                spots = [(0.25, (y0 + y1) / 2), (0.75, (y0 + y1) / 2)]
                size = min(size, 0.42)
            shape = rng.random(2) < 0.35
            for i, (x, y) in enumerate(spots):
                self._add(image, rng, scene, bool(shape[i]), [(x, y, size)], avoid)
            if len(scene.groups()) < 2:
                return
            (ax, ay), (bx, by) = spots
            if (ax > bx) if abs(ax - bx) >= abs(ay - by) else (ay > by):
                scene.items.reverse()
            return
        number = int(rng.integers(1, 6))
        spots = None
        size = 0.0
        while spots is None:
            size = min(rng.uniform(0.15, 0.36 if number < 4 else 0.28), height * 0.9)
            spots = _spread(rng, number, area, size)
        self._add(image, rng, scene, rng.random() < 0.5, [(x, y, size) for x, y in spots], avoid)

    def _add(
        self,
        image: Image.Image,
        rng: np.random.Generator,
        scene: Scene,
        is_shape: bool,
        spots: list[tuple[float, float, float]],
        avoid: list[tuple[int, int, int]],
    ) -> None:
        """Draw the same thing once at each spot (x, y, size)."""
        taken = {item.name for item in scene.items}
        if is_shape:
            name = str(rng.choice([s for s in vocabulary.SHAPES if s not in taken]))
            colour, rgb = _contrasting(rng, avoid)
            tilt = rng.uniform(-15, 15)
            sprite = None
        else:
            name = str(rng.choice(self.names))
            while name in taken:
                name = str(rng.choice(self.names))
            choices = self.sprites[name]
            sprite = choices[int(rng.integers(len(choices)))]
            colour = sprite.colour
            flip = rng.random() < 0.4
            tilt = rng.normal(0, 8) if rng.random() < 0.7 else rng.uniform(-25, 25)
            gain = rng.uniform(0.85, 1.12)
        for x, y, size in spots:
            pixels = round(size * self.size * rng.uniform(0.92, 1.0))
            if sprite is None:
                layer = _draw_shape(name, rgb, pixels, tilt + rng.uniform(-4, 4), rng)
            else:
                layer = Image.fromarray(sprite.pixels)
                if flip:
                    layer = layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                scale = pixels / max(layer.size)
                layer = layer.resize(
                    tuple(max(4, round(s * scale)) for s in layer.size), Image.Resampling.BILINEAR
                )
                turn = tilt + rng.uniform(-4, 4)
                if abs(turn) > 3:
                    layer = layer.rotate(turn, Image.Resampling.BILINEAR, expand=True)
                if abs(gain - 1) > 0.04:
                    red, green, blue, alpha = layer.split()
                    bands = [b.point(lambda v: min(255, int(v * gain))) for b in (red, green, blue)]
                    layer = Image.merge("RGBA", (*bands, alpha))
            corner = (
                round(x * self.size - layer.width / 2),
                round(y * self.size - layer.height / 2),
            )
            image.paste(layer, corner, layer)
            scene.items.append(Item(name, is_shape, colour, x, y, size))

    # -- text --------------------------------------------------------------------------------

    def _text(self, rng: np.random.Generator) -> str:
        choice = rng.random()
        if choice < 0.2:
            digits = int(rng.integers(1, 5))
            return str(rng.integers(1, 10)) + "".join(
                str(rng.integers(10)) for _ in range(digits - 1)
            )
        if choice < 0.45 and not self.only_words:
            return "".join(chr(65 + int(rng.integers(26))) for _ in range(rng.integers(2, 7)))
        return self.words[int(rng.integers(len(self.words)))]

    def _write(
        self,
        image: Image.Image,
        rng: np.random.Generator,
        scene: Scene,
        area: tuple[float, float, float, float],
        avoid: list[tuple[int, int, int]],
        text: str | None = None,
    ) -> None:
        x0, y0, x1, y1 = (v * self.size for v in area)
        text = self._text(rng) if text is None else text
        height = rng.uniform(*self.cap_heights) * self.size
        height = min(height, 0.78 * (y1 - y0))
        for attempt in range(6):
            name = str(rng.choice(FONTS if attempt < 4 else _NARROW))
            cap = _font(name, 64).getbbox("H")
            points = height / (cap[3] - cap[1]) * 64
            width = _font(name, 64).getlength(text) * points / 64
            if width > 0.93 * (x1 - x0):
                points *= 0.93 * (x1 - x0) / width
            if points / 64 * (cap[3] - cap[1]) >= MIN_CAP_HEIGHT * self.size:
                break
        font = _font(name, max(16, 2 * round(points / 2)))
        left, top, right, bottom = font.getbbox(text)
        mask = Image.new("L", (right - left + 4, bottom - top + 4), 0)
        ImageDraw.Draw(mask).text((2 - left, 2 - top), text, font=font, fill=255)
        centre = (mask.width / 2, mask.height / 2)
        tilt = rng.uniform(-MAX_TEXT_TILT, MAX_TEXT_TILT)
        if rng.random() < 0.35:
            tilt = 0.0
        if tilt:
            room = (y1 - y0) - mask.height
            limit = math.degrees(math.asin(min(1.0, max(0.0, room / max(mask.width, 1)))))
            tilt = max(-limit, min(limit, tilt))
            mask = mask.rotate(tilt, Image.Resampling.BICUBIC, expand=True)
        px = x0 + max(0.0, (x1 - x0) - mask.width) * rng.random()
        py = y0 + max(0.0, (y1 - y0) - mask.height) * rng.random()
        if len(avoid) > 1 and rng.random() < 0.5:  # a plate behind the word
            plate = _shade(rng, _pick_colour(rng, white=0.5))
            ImageDraw.Draw(image).rectangle(
                (px - 6, py - 5, px + mask.width + 6, py + mask.height + 5), fill=plate
            )
            avoid = [plate]
        colour, rgb = _contrasting(rng, avoid, 230.0)
        image.paste(rgb, (round(px), round(py)), mask)
        scene.text, scene.text_colour = text, colour
        turn = math.radians(tilt)
        for i, letter in enumerate(text):
            width = font.getlength(letter)
            along = 2 - left + font.getlength(text[:i]) + width / 2 - centre[0]
            scene.letters.append(
                Letter(
                    letter,
                    (px + mask.width / 2 + along * math.cos(turn)) / self.size,
                    (py + mask.height / 2 - along * math.sin(turn)) / self.size,
                    width / self.size,
                )
            )

    # -- camera ------------------------------------------------------------------------------

    def _degrade(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        choice = rng.random()
        if choice < 0.1:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.2)))
        if rng.random() < 0.3:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=int(rng.integers(40, 96)))
            image = Image.open(buffer)
        pixels = np.array(image)
        if choice > 0.85:
            side = self.size
            noise = rng.integers(-14, 15, (side, side, 1), dtype=np.int16)
            pixels = np.clip(pixels.astype(np.int16) + noise, 0, 255).astype(np.uint8)
        return pixels


class Mosaics:
    """Pictures tiled with small scenes: many times the local lessons of an ordinary picture.

    Tiles come from a pool that is renewed a little with every picture, so that each is used a few
    times, always among others.
    """

    def __init__(
        self,
        sprites: list[Sprite],
        side: int,
        parts: int,
        rng: np.random.Generator,
        pool: int = 2500,
    ) -> None:
        self.side, self.parts = side, parts
        self.maker = SceneMaker(sprites, side // parts)
        self.maker.cap_heights = (0.5, 0.75)
        self.maker.large_share = 0.85
        self.tiles = [self.maker.tile(rng) for _ in range(pool)]

    def make(self, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, int, Scene]]]:
        """A picture, uint8 (side, side, 3), and each tile's corner in pixels with its facts."""
        self.tiles[int(rng.integers(len(self.tiles)))] = self.maker.tile(rng)
        whole = self.maker.size
        picture = np.empty((self.side, self.side, 3), dtype=np.uint8)
        facts = []
        for y in range(0, self.side, whole):
            for x in range(0, self.side, whole):
                pixels, scene = self.tiles[int(rng.integers(len(self.tiles)))]
                picture[y : y + whole, x : x + whole] = pixels
                facts.append((x, y, scene))
        return picture, facts


@lru_cache(maxsize=2)
def dictionary_words(held_out: bool) -> tuple[str, ...]:
    """Upper-case dictionary words of two to six letters: the training part or the held-out part."""
    words = set()
    for line in WORD_LIST.read_text(encoding="utf-8").splitlines():
        if line.isascii() and line.isalpha() and line.islower() and 2 <= len(line) <= 6:
            words.add(line.upper())
    held = {w for w in words if zlib.crc32(w.encode()) % _HELD_OUT_WORDS == 0}
    return tuple(sorted(held if held_out else words - held))


@lru_cache(maxsize=600)
def _font(name: str, points: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_FONT_ROOT / name), points)


def _pick_colour(rng: np.random.Generator, white: float = 0.1) -> str:
    if rng.random() < white:
        return "white"
    return str(rng.choice(list(vocabulary.COLOURS)))


def _shade(rng: np.random.Generator, name: str) -> tuple[int, int, int]:
    """A random shade that people would still call by `name`."""
    base = np.array(vocabulary.COLOURS[name], dtype=np.float64)
    spread = 7 if name in ("white", "black", "grey", "orange", "brown") else 16
    if name in ("green", "blue", "purple", "red"):
        base = base * rng.uniform(0.75, 1.12)
    if name in ("blue", "green") and rng.random() < 0.3:  # light blue and light green
        base = base + (255 - base) * rng.uniform(0.15, 0.5)
    rgb = np.clip(base + rng.normal(0, spread / 2, 3), 0, 255)
    return tuple(int(v) for v in rgb)


def _contrasting(
    rng: np.random.Generator, avoid: list[tuple[int, int, int]], enough: float = 150.0
) -> tuple[str, tuple[int, int, int]]:
    """A named colour and a shade of it that can be told from every colour in `avoid`."""
    best: tuple[float, str, tuple[int, int, int]] | None = None
    for _ in range(12):
        name = str(rng.choice(list(vocabulary.COLOURS)))
        rgb = _shade(rng, name)
        gap = min(_distance(rgb, other) for other in avoid)
        if best is None or gap > best[0]:
            best = (gap, name, rgb)
        if gap > enough:
            break
    return best[1], best[2]


def _distance(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Distance of two colours, with lightness weighted up."""
    dr, dg, db = (float(p - q) for p, q in zip(a, b, strict=True))
    light = 0.299 * dr + 0.587 * dg + 0.114 * db
    return math.sqrt(0.35 * (dr * dr + dg * dg + db * db) + 2.0 * light * light)


def _gradient(
    rng: np.random.Generator, side: int, first: tuple[int, ...], second: tuple[int, ...]
) -> Image.Image:
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    ramp = axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)
    ramp = ((ramp - ramp.min()) / np.ptp(ramp))[..., None]
    pixels = ramp * np.array(first, np.float32) + (1 - ramp) * np.array(second, np.float32)
    return Image.fromarray(pixels.astype(np.uint8))


def _spread(
    rng: np.random.Generator, number: int, area: tuple[float, float, float, float], size: float
) -> list[tuple[float, float]] | None:
    """Choose `number` centres in `area` that lie at least `size` apart, or None."""
    x0, y0, x1, y1 = area
    half = size / 2
    spots: list[tuple[float, float]] = []
    for _ in range(60):
        x = rng.uniform(x0 + half, x1 - half)
        y = rng.uniform(y0 + half, max(y0 + half + 1e-6, y1 - half))
        if all(math.hypot(x - a, y - b) > 1.06 * size for a, b in spots):
            spots.append((x, y))
            if len(spots) == number:
                return spots
    return None


def _polygon(corners: int, start: float = -90.0) -> list[tuple[float, float]]:
    angles = [math.radians(start + 360 * i / corners) for i in range(corners)]
    return [(math.cos(a), math.sin(a)) for a in angles]


def _shape_points(name: str) -> list[tuple[float, float]]:
    """Outline of a shape within the unit circle or square, y downwards."""
    if name == "circle":
        return _polygon(48)
    if name == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if name == "triangle":
        return _polygon(3)
    if name == "pentagon":
        return _polygon(5)
    if name == "diamond":
        return [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)]
    if name == "cross":
        a, b = 0.3, 0.92
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    if name == "star":
        outer, inner = _polygon(5), _polygon(5, -54.0)
        return [p for o, i in zip(outer, inner, strict=True) for p in (o, (i[0] * 0.4, i[1] * 0.4))]
    points = []  # heart
    for i in range(48):
        t = 2 * math.pi * i / 48
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 17, -(y + 2) / 17))
    return points


def _draw_shape(
    name: str, rgb: tuple[int, int, int], side: int, tilt: float, rng: np.random.Generator
) -> Image.Image:
    """Draw a filled shape, RGBA (side, side), sometimes with an outline."""
    big = 2 * side
    layer = Image.new("RGBA", (big, big), (*rgb, 0))
    turn = math.radians(tilt)
    cos, sin = math.cos(turn) * side * 0.97, math.sin(turn) * side * 0.97
    points = [(side + x * cos - y * sin, side + x * sin + y * cos) for x, y in _shape_points(name)]
    draw = ImageDraw.Draw(layer)
    draw.polygon(points, fill=(*rgb, 255))
    if rng.random() < 0.2:
        edge = (20, 20, 20, 255) if sum(rgb) > 160 else (240, 240, 240, 255)
        draw.line([*points, points[0]], fill=edge, width=max(2, big // 50))
    return layer.resize((side, side), Image.Resampling.BILINEAR)
