"""The encoder's pixels, against the reference's arithmetic written out plainly, and by property."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from fastvlm_mlx.errors import ConfigError, PictureError
from fastvlm_mlx.processing import geometry
from fastvlm_mlx.processing.geometry import Box, PictureProcessor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

FASTVLM = {
    "crop_size": {"height": 64, "width": 64},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.0, 0.0, 0.0],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [1.0, 1.0, 1.0],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 64},
}
CLIP = {**FASTVLM, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}

PAD = {"image_aspect_ratio": "pad"}

sides = st.integers(1, 150)
aspects = st.sampled_from(["pad", "crop", "stretch"])


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- the reference, written out ------------------------------------------------------------------


def squared(pixels: np.ndarray, mean) -> np.ndarray:
    """Padding to a square, before anything else."""
    height, width, _ = pixels.shape
    side = max(height, width)
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = [int(x * 255) for x in mean]
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    return canvas


def clip_processed(pixels: np.ndarray, edge, crop, mean, std, factor) -> np.ndarray:
    """The CLIP image processor: short side to `edge`, centre crop (h, w), rescale, normalise."""
    height, width, _ = pixels.shape
    if width <= height:
        resized_height, resized_width = int(edge * height / width), edge
    else:
        resized_height, resized_width = edge, int(edge * width / height)
    # Rows, then columns: the order of Pillow's passes up to version 12.
    picture = Image.fromarray(pixels).resize((resized_width, height), Image.Resampling.BICUBIC)
    picture = picture.resize((resized_width, resized_height), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    out = np.zeros((*crop, 3), np.uint8)
    top, left = (resized_height - crop[0]) // 2, (resized_width - crop[1]) // 2
    for y in range(crop[0]):
        for_x = slice(max(0, -left), min(crop[1], resized_width - left))
        if 0 <= y + top < resized_height:
            out[y, for_x] = pixels[y + top, for_x.start + left : for_x.stop + left]
    values = (out.astype(np.float64) * factor).astype(np.float32)
    return (values - np.array(mean, np.float32)) / np.array(std, np.float32)


def reference(picture: Image.Image, config: dict, pad: bool) -> np.ndarray:
    pixels = np.asarray(picture)
    if pad:
        pixels = squared(pixels, config["image_mean"])
    return clip_processed(
        pixels,
        config["size"]["shortest_edge"],
        (config["crop_size"]["height"], config["crop_size"]["width"]),
        config["image_mean"],
        config["image_std"],
        config["rescale_factor"],
    )


SIZES = [
    *((64, 64), (100, 64), (64, 100), (101, 64), (64, 101), (33, 200), (200, 33)),
    *((1, 1), (1, 300), (300, 1), (63, 65), (65, 63), (500, 499), (7, 5), (640, 480)),
]


@pytest.mark.parametrize("config", [FASTVLM, CLIP], ids=["fastvlm", "clip"])
@pytest.mark.parametrize("pad", [True, False], ids=["pad", "crop"])
@pytest.mark.parametrize("crop", [(64, 64), (48, 48), (47, 63), (80, 80), (51, 81), (99, 30)])
def test_agrees_with_the_reference_to_the_bit(config, pad, crop):
    config = {**config, "crop_size": {"height": crop[0], "width": crop[1]}}
    processor = PictureProcessor.from_config(config, PAD if pad else {})
    for size in SIZES:
        picture = noise(*size)
        assert np.array_equal(processor.one(picture), reference(picture, config, pad)), size


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 70), st.booleans(), st.integers(0, 9))
def test_agrees_with_the_reference_for_any_shape(width, height, edge, pad, seed):
    config = {**CLIP, "size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    processor = PictureProcessor.from_config(config, PAD if pad else None)
    picture = noise(width, height, seed)
    assert np.array_equal(processor.one(picture), reference(picture, config, pad))


def swaps_passes(size, edge) -> bool:
    """Whether this Pillow resizes columns before rows, as it may from version 13 on."""
    width, height = size
    height, width = (
        (edge * height // width, edge) if width <= height else (edge, edge * width // height)
    )
    rows_first = noise(*size).resize((width, size[1]), Image.Resampling.BICUBIC)
    rows_first = rows_first.resize((width, height), Image.Resampling.BICUBIC)
    at_once = noise(*size).resize((width, height), Image.Resampling.BICUBIC)
    return rows_first.tobytes() != at_once.tobytes()


@pytest.mark.parametrize("pad", [True, False], ids=["pad", "crop"])
@pytest.mark.parametrize("config", [FASTVLM, CLIP], ids=["fastvlm", "clip"])
def test_agrees_with_transformers(config, pad):
    """The published implementation itself, where it is installed."""
    transformers = pytest.importorskip("transformers")
    # The Pillow form: CLIPImageProcessor before transformers 5, CLIPImageProcessorPil since.
    processor_type = getattr(transformers, "CLIPImageProcessorPil", None)
    processor_type = processor_type or transformers.CLIPImageProcessor
    for crop in [(64, 64), (47, 63), (51, 81)]:
        crop_size = {"height": crop[0], "width": crop[1]}
        theirs = processor_type(
            size={"shortest_edge": 64},
            crop_size=crop_size,
            image_mean=config["image_mean"],
            image_std=config["image_std"],
        )
        ours = PictureProcessor.from_config(
            {**config, "crop_size": crop_size}, PAD if pad else {"image_aspect_ratio": "square"}
        )
        for size in SIZES:
            picture = noise(*size)
            seen = Image.fromarray(squared(np.asarray(picture), theirs.image_mean))
            if not pad and swaps_passes(size, 64):
                continue
            expected = theirs(seen if pad else picture, return_tensors="np")["pixel_values"][0]
            assert np.array_equal(ours.one(picture), np.moveaxis(expected, 0, -1)), (crop, size)


# --- properties ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(sides, sides), max_size=3), sides, sides, aspects)
def test_shape_and_type(sizes, height, width, aspect):
    processor = PictureProcessor(size=(height, width), aspect=aspect)
    batch = processor([noise(*size) for size in sizes])
    assert batch.shape == (len(sizes), height, width, 3)
    assert batch.dtype == np.float32
    assert batch.size == 0 or (batch.min() >= 0 and batch.max() <= 1)


@settings(max_examples=100, deadline=None)
@given(*[st.integers(1, 5000)] * 4, st.sampled_from(["pad", "crop"]))
def test_nothing_is_stretched(width, height, target_height, target_width, aspect):
    processor = PictureProcessor(size=(target_height, target_width), aspect=aspect)
    box = processor.content_box((width, height))
    # Both axes have one scale, but for the rounding of one side to whole pixels: of the canvas
    # (half a pixel there) with "pad", of the resized picture with "crop".
    across, down = (box.right - box.left) / width, (box.bottom - box.top) / height
    if aspect == "pad":
        scale = min(target_width / width, target_height / height)
        slack = max(scale / 2 / target_height, scale / 2 / target_width)
    else:
        scale = max(target_width / width, target_height / height)
        slack = 1 / min(width * scale, height * scale) if min(width, height) else 0
    assert across == pytest.approx(scale, rel=slack + 1e-9)
    assert down == pytest.approx(scale, rel=slack + 1e-9)


@settings(max_examples=100, deadline=None)
@given(*[st.integers(1, 5000)] * 4, aspects)
def test_content_lies_in_the_middle(width, height, target_height, target_width, aspect):
    processor = PictureProcessor(size=(target_height, target_width), aspect=aspect)
    box = processor.content_box((width, height))
    layout = processor._layout(width, height)
    for before, after, axis in (
        (box.left, target_width - box.right, 0),
        (box.top, target_height - box.bottom, 1),
    ):
        # The offset is rounded to a whole pixel, of the canvas or of the resized picture.
        pixel = layout.resized[axis] / layout.canvas[axis] if aspect == "pad" else 1
        assert abs(before - after) <= pixel + 1e-6
        if aspect == "pad":
            assert min(before, after) >= -1e-6
        else:
            assert max(before, after) <= 1e-6
    inside = box.within(target_height, target_width)
    assert 0 <= inside.left <= inside.right <= target_width
    assert 0 <= inside.top <= inside.bottom <= target_height
    if aspect == "pad":
        assert inside == pytest.approx(box, abs=1e-6)
    else:
        assert inside == pytest.approx((0, 0, target_width, target_height))


@settings(max_examples=40, deadline=None)
@given(sides, sides, sides, sides)
def test_padding_has_exactly_the_mean_colour(width, height, target_height, target_width):
    processor = PictureProcessor((target_height, target_width), mean=CLIP_MEAN, std=CLIP_STD)
    pixels = np.asarray(processor.fit(noise(width, height)))
    box = processor.content_box((width, height))
    # A bicubic filter reaches two pixels of whichever side has the larger ones over the edge.
    layout = processor._layout(width, height)
    padding = np.ones((target_height, target_width), bool)
    reach_x, reach_y = (2 * max(1, layout.resized[a] / layout.canvas[a]) + 1 for a in (0, 1))
    padding[
        max(0, math.floor(box.top - reach_y)) : math.ceil(box.bottom + reach_y),
        max(0, math.floor(box.left - reach_x)) : math.ceil(box.right + reach_x),
    ] = False
    assert (pixels[padding] == [int(x * 255) for x in CLIP_MEAN]).all()


@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("target", [(96, 96), (64, 128), (128, 64)])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (80, 60), (250, 250)])
def test_a_circle_stays_a_circle_where_the_box_says(aspect, target, size):
    picture = Image.new("RGB", size, (0, 0, 0))
    radius, (x, y) = min(size) * 0.2, (size[0] / 2, size[1] / 2)
    corners = (x - radius, y - radius, x + radius - 1, y + radius - 1)  # the last is included
    ImageDraw.Draw(picture).ellipse(corners, "white")
    processor = PictureProcessor(size=target, aspect=aspect)
    mass = processor.one(picture)[..., 0] > 0.5
    rows, columns = np.flatnonzero(mass.any(1)), np.flatnonzero(mass.any(0))
    assert abs(len(rows) - len(columns)) <= 1
    box = processor.content_box(size)
    scale = (box.right - box.left) / size[0]
    assert len(columns) == pytest.approx(2 * radius * scale, abs=2)
    assert columns.mean() + 0.5 == pytest.approx((box.left + box.right) / 2, abs=1)
    assert rows.mean() + 0.5 == pytest.approx((box.top + box.bottom) / 2, abs=1)


def test_content_box_finds_a_mark():
    picture = Image.new("RGB", (200, 100))
    picture.paste((255, 255, 255), (150, 20, 160, 30))
    for processor in (
        PictureProcessor((100, 100)),
        PictureProcessor((100, 100), aspect="stretch"),
        PictureProcessor((150, 150), crop=(130, 130), aspect="crop"),
    ):
        box = processor.content_box(picture.size)
        rows, columns = np.nonzero(np.asarray(processor.fit(picture))[..., 0] > 127)
        across, down = (box.right - box.left) / 200, (box.bottom - box.top) / 100
        if len(columns) and columns.max() < processor.output_size[1] - 1:
            assert columns.mean() + 0.5 == pytest.approx(box.left + 155 * across, abs=1)
            assert rows.mean() + 0.5 == pytest.approx(box.top + 25 * down, abs=1)
    assert PictureProcessor((100, 100)).content_box((200, 100)) == (0, 25, 100, 75)
    assert Box(-5, 1, 50, 9).within(8, 40) == (0, 1, 40, 8)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(90, 70), (70, 90), (3, 200), (200, 3)])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_strips_do_not_change_the_result(size, rows, monkeypatch):
    processor = PictureProcessor((48, 56), mean=CLIP_MEAN, std=CLIP_STD)
    whole = processor.one(noise(*size))
    monkeypatch.setattr(geometry, "_STRIP_PIXELS", rows * max(size))
    assert np.array_equal(processor.one(noise(*size)), whole)


@pytest.mark.parametrize("size", [(300, 20), (20, 300), (61, 60), (2, 150)])
@pytest.mark.parametrize("crop", [None, (40, 40), (60, 70)])
def test_resizing_only_what_is_seen_agrees_within_one_level(size, crop, monkeypatch):
    processor = PictureProcessor((50, 50), crop=crop, aspect="crop")
    whole = np.asarray(processor.fit(noise(*size))).astype(int)
    monkeypatch.setattr(geometry, "_WHOLE_RESIZE_PIXELS", 0)
    assert np.abs(np.asarray(processor.fit(noise(*size))) - whole).max() <= 1


@pytest.mark.parametrize("aspect", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(1, 10000), (10000, 1)])
def test_extreme_shapes(aspect, size):
    grey = Image.new("RGB", size, (99, 99, 99))
    processor = PictureProcessor((256, 256), aspect=aspect)
    if aspect == "pad":  # one pixel in 10000 is next to nothing
        assert np.asarray(processor.fit(grey)).max() <= 99
    else:
        assert (np.asarray(processor.fit(grey)) == 99).all()


def test_absurd_shapes_are_refused():
    with pytest.raises(PictureError, match="too long and thin"):
        PictureProcessor().fit(Image.new("RGB", (1, 300_000)))
    with pytest.raises(PictureError, match="no pixels"):
        PictureProcessor().content_box((0, 3))


# --- what goes in --------------------------------------------------------------------------------


def test_a_batch_is_its_pictures_one_by_one():
    processor = PictureProcessor((32, 40))
    pictures = [noise(30, 20), noise(64, 64), noise(9, 90)]
    assert np.array_equal(processor(pictures), np.stack([processor.one(p) for p in pictures]))


def test_other_modes_are_made_rgb():
    processor = PictureProcessor((8, 8))
    assert (processor.one(Image.new("RGBA", (8, 8), (0, 0, 0, 0))) == 1).all()
    assert (processor.one(Image.new("I;16", (8, 8), 65535)) == 1).all()


def test_picture_is_left_as_it_was():
    picture = noise(30, 20)
    before = picture.tobytes()
    PictureProcessor((16, 16))([picture])
    assert picture.tobytes() == before


# --- configuration -------------------------------------------------------------------------------


def test_defaults_are_those_of_the_released_models():
    processor = PictureProcessor.from_config(FASTVLM, PAD).with_size(1024, 1024)
    assert processor == PictureProcessor()
    with pytest.raises(FrozenInstanceError):
        processor.size = (1, 1)


@pytest.mark.parametrize(
    ("size", "expected", "aspect"),
    [
        (48, (48, 48), "crop"),
        ({"shortest_edge": 48}, (48, 48), "crop"),
        ({"height": 48, "width": 40}, (48, 40), "stretch"),
        ([48, 40], (48, 40), "stretch"),
    ],
)
def test_forms_of_size(size, expected, aspect):
    config = {key: value for key, value in FASTVLM.items() if key != "crop_size"}
    processor = PictureProcessor.from_config({**config, "size": size})
    assert (processor.size, processor.crop, processor.aspect) == (expected, None, aspect)
    assert PictureProcessor.from_config({**config, "size": size}, PAD).aspect == "pad"


@pytest.mark.parametrize(
    ("crop", "expected"),
    [(32, (32, 32)), ({"height": 32, "width": 24}, (32, 24)), ([32, 24], (32, 24)), (64, None)],
)
def test_forms_of_crop(crop, expected):
    assert PictureProcessor.from_config({**FASTVLM, "crop_size": crop}).crop == expected
    off = {**FASTVLM, "crop_size": crop, "do_center_crop": False}
    assert PictureProcessor.from_config(off, PAD).crop is None


def test_what_the_files_switch_off():
    processor = PictureProcessor.from_config({**CLIP, "do_normalize": False}, PAD)
    wide = noise(64, 2)
    assert np.array_equal(processor.one(wide)[0, 0] * 255, [int(x * 255) for x in CLIP_MEAN])
    processor = PictureProcessor.from_config({**FASTVLM, "do_rescale": False}, PAD)
    assert np.array_equal(processor.one(noise(64, 64)), np.asarray(noise(64, 64)))


def test_what_the_files_leave_out():
    processor = PictureProcessor.from_config({"size": 32})
    assert (processor.mean, processor.std) == (CLIP_MEAN, CLIP_STD)
    assert processor.rescale_factor == 1 / 255
    assert processor.resample is Image.Resampling.BICUBIC
    assert PictureProcessor.from_config({"size": 32, "image_mean": 0.5}).mean == (0.5,) * 3


def test_who_decides_the_aspect():
    def aspect(preprocessor, model=None, **options):
        return PictureProcessor.from_config({**FASTVLM, **preprocessor}, model, **options).aspect

    assert aspect({}) == aspect({}, {"image_aspect_ratio": "square"}) == "crop"
    assert aspect({}, {"image_aspect_ratio": None}) == "crop"
    assert aspect({"do_pad": True}) == "pad"  # transformers' LLaVA processor
    assert aspect({"do_pad": None}) == "crop"
    assert aspect({}, {"image_aspect_ratio": "anyres"}, aspect="pad") == "pad"
    assert PictureProcessor.from_config({"image_processor": FASTVLM}, PAD).size == (64, 64)


@pytest.mark.parametrize(
    ("preprocessor", "model", "named"),
    [
        ({"size": None}, {}, "size"),
        ({"size": {"longest_edge": 9}}, {}, "size"),
        ({"size": {"shortest_edge": 9, "longest_edge": 99}}, {}, "shortest_edge"),
        ({"size": {"height": 9}}, {}, "size"),
        ({"size": 0}, {}, "size"),
        ({"size": "64"}, {}, "size"),
        ({"crop_size": [1, 2, 3]}, {}, "crop_size"),
        ({"do_resize": False}, {}, "do_resize"),
        ({"do_center_crop": False}, {}, "do_center_crop"),
        ({"image_mean": [0.5, 0.5]}, {}, "image_mean"),
        ({"image_mean": ["a"] * 3}, {}, "image_mean"),
        ({"image_mean": [123, 117, 104]}, PAD, "image_mean"),
        ({"image_std": [1, 0, 1]}, {}, "image_std"),
        ({"rescale_factor": "1/255"}, {}, "rescale_factor"),
        ({"resample": 77}, {}, "resample"),
        ({}, {"image_aspect_ratio": "anyres"}, "tiles"),
        ({}, {"image_aspect_ratio": "anyres_max_9"}, "tiles"),
        ({}, {"image_aspect_ratio": "highres"}, "image_aspect_ratio"),
    ],
)
def test_configurations_that_make_no_sense(preprocessor, model, named):
    with pytest.raises(ConfigError, match=named) as caught:
        PictureProcessor.from_config({**FASTVLM, **preprocessor}, model)
    assert "\n" not in str(caught.value)


def test_values_are_checked():
    for wrong in [{"size": (0, 4)}, {"size": (4.0, 4)}, {"crop": (4,)}, {"aspect": "squash"}]:
        with pytest.raises(ConfigError):
            PictureProcessor(**wrong)


def test_with_size():
    assert PictureProcessor((64, 64)).with_size(32, 48).output_size == (32, 48)
    smaller = PictureProcessor((256, 256), crop=(224, 224), aspect="crop").with_size(112, 112)
    assert (smaller.size, smaller.crop) == ((128, 128), (112, 112))
