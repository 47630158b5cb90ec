"""From an RGB picture to the encoder's pixels: pad, resize, crop, scale.

The released FastVLM models were trained on pictures prepared in one particular way, and an answer
can change with a single pixel, so every step here gives the same numbers as the reference:
`process_images` in apple/ml-fastvlm (llava/mm_utils.py) followed by the CLIP image processor of
Hugging Face transformers in its Pillow form.

    picture --pad--> canvas --bicubic resize--> resized --centre crop--> (H, W, 3) uint8
            --times rescale_factor, minus mean, over std--> (H, W, 3) float32

Notation: sizes of the model's input are (height, width), as in configurations; sizes of pictures
are (width, height), as in `PIL.Image.Image.size`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

from fastvlm_mlx.errors import ConfigError, PictureError
from fastvlm_mlx.processing.pictures import open_picture

__all__ = ["Aspect", "Box", "PictureProcessor"]

Aspect = Literal["pad", "crop", "stretch"]
"""How a picture of another shape than the model's input is made to fit.

pad: the whole picture, with bars in the mean colour. crop: the input is filled and what juts out is
cut off on both sides. stretch: each axis is scaled on its own, which distorts; for encoders that
were trained that way.
"""

# The CLIP image processor's own values, which apply when a configuration leaves them out.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Memory bounds, in pixels (Pillow keeps an RGB pixel in four bytes). None of them changes a result,
# except that beyond _WHOLE_RESIZE_PIXELS a crop may differ from the reference, which would need
# gigabytes there, by a rounding step.
_STRIP_PIXELS = 1 << 23
_WHOLE_RESIZE_PIXELS = 1 << 26
_BETWEEN_PASSES_PIXELS = 1 << 28


class Box(NamedTuple):
    """A rectangle in pixels of the model's input; fractions are meant, and it may reach outside."""

    left: float
    top: float
    right: float
    bottom: float

    def within(self, height: int, width: int) -> Box:
        """The part of the box that lies inside an input of this size."""
        return Box(
            min(max(self.left, 0.0), width),
            min(max(self.top, 0.0), height),
            min(max(self.right, 0.0), width),
            min(max(self.bottom, 0.0), height),
        )


class _Layout(NamedTuple):
    """Where one picture goes; all sizes are (width, height)."""

    canvas: tuple[int, int]  # the picture with its padding
    offset: tuple[int, int]  # of the picture on the canvas
    resized: tuple[int, int]  # the canvas after the resize
    corner: tuple[int, int]  # of the crop on the resized canvas; negative where it is larger


@dataclass(frozen=True)
class PictureProcessor:
    """Turns pictures into the encoder's input; the defaults are the released FastVLM models'.

    Attributes:
        size: (height, width) that the picture is resized to ("pad", "stretch") or made to cover
            ("crop").
        crop: (height, width) cut from the centre afterwards; None means `size`. Where it is larger
            than what there is to cut from, the rest is black before normalisation, as in the
            reference.
        mean, std: per channel, in the unit of rescaled values.
        rescale_factor: multiplies the 8-bit values.
        aspect: see `Aspect`.
        normalize: False leaves out mean and std, though `mean` still gives the padding's colour.
        resample: the filter of the resize.

    Raises:
        ConfigError: values that describe no usable input.
    """

    size: tuple[int, int] = (1024, 1024)
    crop: tuple[int, int] | None = None
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    rescale_factor: float = 1 / 255
    aspect: Aspect = "pad"
    normalize: bool = True
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        for name, pair in (("size", self.size), ("crop", self.crop or self.size)):
            if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
                raise ConfigError(
                    f"picture {name} {pair!r} must be (height, width), whole numbers above 0"
                )
        if self.aspect not in get_args(Aspect):
            choices = ", ".join(get_args(Aspect))
            raise ConfigError(f"picture aspect {self.aspect!r} is unknown; use one of {choices}")
        for name, triple in (("image_mean", self.mean), ("image_std", self.std)):
            if len(triple) != 3 or not all(math.isfinite(x) for x in triple):
                raise ConfigError(f"{name} {triple!r} must be three finite numbers")
        if self.normalize and 0 in self.std:
            raise ConfigError(f"image_std {self.std!r} must not contain 0")
        if self.aspect == "pad" and not all(0 <= x <= 1 for x in self.mean):
            raise ConfigError(
                f"image_mean {self.mean!r} must lie in [0, 1] to give the padding its colour"
            )

    @classmethod
    def from_config(
        cls,
        preprocessor_config: Mapping[str, Any],
        model_config: Mapping[str, Any] | None = None,
        *,
        aspect: Aspect | None = None,
    ) -> PictureProcessor:
        """Read a published preprocessor_config.json, and the model's wish from its config.json.

        `image_aspect_ratio` of the model decides between padding and what the preprocessor does by
        itself: centre crop where `size` is the short side, stretching where it gives height and
        width. Keys that are left out have the CLIP image processor's values, except that `size`
        must be there and `crop_size` then equals it.

        Args:
            preprocessor_config: the parsed file; one nested under "image_processor" is found there.
            model_config: the parsed config.json, for `image_aspect_ratio`.
            aspect: overrides both files, so a model that asks for tiles can see the whole picture.

        Raises:
            ConfigError: something needed is missing, malformed or unsupported.
        """
        config = preprocessor_config.get("image_processor", preprocessor_config)
        if not config.get("do_resize", True):
            raise ConfigError("do_resize: false is unsupported; pictures must come to one size")
        size, exact = _read_size(config)
        crop = _read_crop(config, size)

        if aspect is None:
            pad = _wants_padding(model_config or {}) or bool(config.get("do_pad", False))
            aspect = "pad" if pad else "stretch" if exact else "crop"
            if aspect == "crop" and crop is None:
                raise ConfigError(
                    "do_center_crop: false with a size that only gives the short side makes "
                    "pictures of different shapes; set image_aspect_ratio: pad in config.json"
                )
        return cls(
            size=size,
            crop=None if crop == size else crop,
            mean=_triple(config, "image_mean", _CLIP_MEAN),
            std=_triple(config, "image_std", _CLIP_STD),
            rescale_factor=_rescale_factor(config),
            aspect=aspect,
            normalize=bool(config.get("do_normalize", True)),
            resample=_resampling(config),
        )

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of what the encoder gets."""
        return self.crop or self.size

    def with_size(self, height: int, width: int) -> PictureProcessor:
        """The same for another input size; a margin that `crop` cuts off stays in proportion."""
        if self.crop is None:
            return replace(self, size=(height, width))
        size = (
            round(height * self.size[0] / self.crop[0]),
            round(width * self.size[1] / self.crop[1]),
        )
        return replace(self, size=size, crop=(height, width))

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Pictures of any sizes -> (B, H, W, 3) float32, channels last.

        Raises:
            PictureError: a picture without pixels, or too long and thin to be resized in memory.
        """
        height, width = self.output_size
        batch = np.empty((len(pictures), height, width, 3), dtype=np.float32)
        for pixels, picture in zip(batch, pictures, strict=True):
            fitted = np.asarray(self.fit(picture))
            for channel, table in enumerate(self._tables):
                pixels[..., channel] = table[fitted[..., channel]]
        return batch

    def one(self, picture: Image.Image) -> np.ndarray:
        """One picture -> (H, W, 3) float32."""
        pixels: np.ndarray = self([picture])[0]
        return pixels

    def fit(self, picture: Image.Image) -> Image.Image:
        """What the model gets to see, still in 8 bits: padded, resized and cropped."""
        if picture.mode != "RGB":
            picture = open_picture(picture, orient=False)
        layout = self._layout(*picture.size)
        height, width = self.output_size
        left, top = layout.corner
        if self.aspect == "crop" and math.prod(layout.resized) > _WHOLE_RESIZE_PIXELS:
            return self._resize_seen_part(picture, layout)
        if layout.resized[0] * layout.canvas[1] > _BETWEEN_PASSES_PIXELS:
            size = f"{picture.width}x{picture.height}"
            raise PictureError(f"a picture of {size} is too long and thin; cut it into pieces")
        resized = self._resize_padded(picture, layout)
        # Pillow fills what lies outside with zeros, as the reference does for too large a crop.
        return resized.crop((left, top, left + width, top + height))

    def content_box(self, picture_size: tuple[int, int]) -> Box:
        """Where a picture of (width, height) lies in the model's input.

        The whole picture is meant: with "crop" the box reaches outside the input (`Box.within` cuts
        it), so that `(x - left) / (right - left)` is always the place in the picture as a fraction
        of its width.
        """
        layout = self._layout(*picture_size)

        def span(axis: int) -> tuple[float, float]:
            resized, canvas = layout.resized[axis], layout.canvas[axis]
            start = layout.offset[axis] * resized / canvas - layout.corner[axis]
            return start, start + picture_size[axis] * resized / canvas

        (left, right), (top, bottom) = span(0), span(1)
        return Box(left, top, right, bottom)

    @cached_property
    def _tables(self) -> np.ndarray:
        """(3, 256) float32: the value of each 8-bit level in each channel.

        An 8-bit channel has only 256 outcomes, so they are worked out once, with the reference's
        roundings: the product in float64, then mean and std in float32.
        """
        levels = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        if not self.normalize:
            return np.stack([levels] * 3)
        mean = np.array(self.mean, dtype=np.float32)[:, None]
        std = np.array(self.std, dtype=np.float32)[:, None]
        return (levels - mean) / std

    def _layout(self, width: int, height: int) -> _Layout:
        if width < 1 or height < 1:
            raise PictureError(f"a picture of {width}x{height} has no pixels; give another")
        target_height, target_width = self.size
        canvas = resized = width, height
        if self.aspect == "pad":
            canvas = _canvas_size(width, height, target_width, target_height)
        if self.aspect == "crop":
            resized = _covering_size(width, height, target_width, target_height)
        else:
            resized = target_width, target_height
        crop_height, crop_width = self.output_size
        return _Layout(
            canvas=canvas,
            offset=((canvas[0] - width) // 2, (canvas[1] - height) // 2),
            resized=resized,
            corner=((resized[0] - crop_width) // 2, (resized[1] - crop_height) // 2),
        )

    def _resize_padded(self, picture: Image.Image, layout: _Layout) -> Image.Image:
        """Resize the picture on its canvas without holding the canvas, huge for a panorama.

        Pillow resizes in two passes, along the rows and then along the columns, with 8-bit values
        between. So the first pass can go strip by strip, and rows of padding pass it unchanged: the
        result is the same to the bit. Done here one by one, the passes also keep that order where
        Pillow 13 would swap them for speed (python-pillow/Pillow#9549).
        """
        colour = tuple(int(x * 255) for x in self.mean)
        (width, height), (x, y) = layout.canvas, layout.offset
        between = Image.new("RGB", (layout.resized[0], height), colour)
        rows = max(1, _STRIP_PIXELS // width)
        for top in range(0, picture.height, rows):
            bottom = min(top + rows, picture.height)
            strip = picture.crop((0, top, picture.width, bottom))
            if width > picture.width:
                strip, content = Image.new("RGB", (width, bottom - top), colour), strip
                strip.paste(content, (x, 0))
            strip = strip.resize((layout.resized[0], bottom - top), self.resample)
            between.paste(strip, (0, y + top))
        return between.resize(layout.resized, self.resample)

    def _resize_seen_part(self, picture: Image.Image, layout: _Layout) -> Image.Image:
        """Resize only what the crop will show, as the whole would not fit in memory."""
        height, width = self.output_size
        fitted = Image.new("RGB", (width, height))
        (left, top), (resized_width, resized_height) = layout.corner, layout.resized
        seen = (
            max(left, 0),
            max(top, 0),
            min(left + width, resized_width),
            min(top + height, resized_height),
        )
        seen_width, seen_height = seen[2] - seen[0], seen[3] - seen[1]
        across, down = picture.width / resized_width, picture.height / resized_height
        upper, lower = seen[1] * down, seen[3] * down
        reach = 3 * max(1, down) + 1  # of the widest filter, in rows of the picture
        first = max(0, math.floor(upper - reach))
        last = min(picture.height, math.ceil(lower + reach))
        # The same two passes as above.
        part = picture.crop((0, first, picture.width, last)).resize(
            (seen_width, last - first),
            self.resample,
            box=(seen[0] * across, 0, seen[2] * across, last - first),
        )
        part = part.resize(
            (seen_width, seen_height),
            self.resample,
            box=(0, upper - first, seen_width, lower - first),
        )
        fitted.paste(part, (seen[0] - left, seen[1] - top))
        return fitted


def _canvas_size(width: int, height: int, target_width: int, target_height: int) -> tuple[int, int]:
    """The smallest canvas of the target's shape that holds the picture: square for a square."""
    if width * target_height >= height * target_width:
        return width, max(height, round(width * target_height / target_width))
    return max(width, round(height * target_width / target_height)), height


def _covering_size(
    width: int, height: int, target_width: int, target_height: int
) -> tuple[int, int]:
    """The picture scaled to just cover the target: by its short side if that is square.

    The longer side is rounded down, as in transformers (`get_resize_output_image_size`).
    """
    if width * target_height <= height * target_width:
        return target_width, int(target_width * height / width)
    return int(target_height * width / height), target_height


def _wants_padding(model_config: Mapping[str, Any]) -> bool:
    """What `image_aspect_ratio` says; absent or "square" leaves the matter to the preprocessor."""
    mode = model_config.get("image_aspect_ratio")
    if mode in (None, "square", "pad"):
        return mode == "pad"
    if isinstance(mode, str) and mode.startswith("anyres"):
        raise ConfigError(
            f"image_aspect_ratio: {mode} (tiles) is not supported yet; use aspect='pad' instead"
        )
    raise ConfigError(
        f"image_aspect_ratio: {mode!r} in config.json is unknown; expected pad, square or anyres"
    )


def _read_size(config: Mapping[str, Any]) -> tuple[tuple[int, int], bool]:
    """`size` as (height, width), and whether both are meant exactly, not just the short side."""
    size = config.get("size")
    if size is None:
        raise ConfigError("preprocessor_config.json has no size; add the model's picture size")
    if isinstance(size, Mapping) and "shortest_edge" in size:
        if size.get("longest_edge") is not None:
            raise ConfigError(f"size {dict(size)} is unsupported; give the shortest_edge alone")
        size = size["shortest_edge"]
    pair = _pair(size, "size")
    return pair, not isinstance(size, int)


def _read_crop(config: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int] | None:
    """`crop_size` as (height, width); None when there is no centre crop."""
    if not config.get("do_center_crop", True):
        return None
    crop = config.get("crop_size")
    return size if crop is None else _pair(crop, "crop_size")


def _pair(value: Any, name: str) -> tuple[int, int]:
    """N, [H, W], {"height": H, "width": W} or {"shortest_edge": N} -> (H, W)."""
    if isinstance(value, Mapping):
        edge = value.get("shortest_edge")
        found = [value.get("height", edge), value.get("width", edge)]
    else:
        found = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(found) != 2 or not all(isinstance(n, int) and n > 0 for n in found):
        raise ConfigError(
            f"{name} {value!r} in preprocessor_config.json is unsupported; use height and width"
        )
    return found[0], found[1]


def _triple(
    config: Mapping[str, Any], name: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    """A number per channel; a single number counts for all three."""
    value = config.get(name)
    if value is None:
        return default
    numbers = list(value) if isinstance(value, list | tuple) else [value] * 3
    if len(numbers) != 3 or not all(isinstance(x, int | float) for x in numbers):
        raise ConfigError(f"{name} {value!r} in preprocessor_config.json must be three numbers")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


def _rescale_factor(config: Mapping[str, Any]) -> float:
    if not config.get("do_rescale", True):
        return 1.0
    value = config.get("rescale_factor")
    value = 1 / 255 if value is None else value
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"rescale_factor {value!r} in preprocessor_config.json must be a number")
    return float(value)


def _resampling(config: Mapping[str, Any]) -> Image.Resampling:
    value = config.get("resample")
    try:
        return Image.Resampling.BICUBIC if value is None else Image.Resampling(value)
    except ValueError:
        raise ConfigError(
            f"resample {value!r} in preprocessor_config.json is unknown; bicubic is 3"
        ) from None
