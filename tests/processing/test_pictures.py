"""Sources, modes, alpha and orientation: whatever the picture is, upright 8-bit RGB comes back."""

import base64
import io
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from fastvlm_mlx.errors import UsageError
from fastvlm_mlx.processing.pictures import describe_source, open_picture

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3, (0,) * 3


def encoded(picture: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def photo() -> Image.Image:
    """Twelve by eight pixels, all different."""
    levels = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    return Image.fromarray(levels)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode == "RGB" and a.size == b.size and a.tobytes() == b.tobytes()


# --- sources -------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_picture(photo, tmp_path, monkeypatch):
    data = encoded(photo)
    path = tmp_path / "a photo, 100% ü.png"
    path.write_bytes(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    with open(path, "rb") as file:
        sources = [
            path,
            str(path),
            "~/" + path.name,
            path.as_uri(),
            data,
            bytearray(data),
            memoryview(data),
            io.BytesIO(data),
            file,
            url,
            url.rstrip("="),  # padding is often lost
            url.replace("data:", "DATA:"),
            photo,
            np.asarray(photo),
        ]
        for source in sources:
            assert same(open_picture(source), photo), describe_source(source)
        assert not file.closed  # the caller's file stays the caller's


def test_percent_encoded_data_url():
    gif = encoded(Image.new("L", (2, 2), 7), "GIF")
    url = "data:image/gif," + "".join(f"%{byte:02x}" for byte in gif)
    assert open_picture(url).getpixel((0, 0)) == (7, 7, 7)


def test_standard_input(photo, monkeypatch):
    class Stdin:
        buffer = io.BytesIO(encoded(photo))

        def isatty(self):
            return False

    monkeypatch.setattr("sys.stdin", Stdin())
    assert same(open_picture("-"), photo)


def test_named_pipe(photo, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(encoded(photo)))
    writer.start()
    assert same(open_picture(pipe), photo)
    writer.join()


def test_web_address(photo):
    data = encoded(photo)

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            moved = self.path == "/old.png"
            self.send_response(302 if moved else 200)
            self.send_header("Location", "/my%20photo.png?size=1")
            self.end_headers()
            self.wfile.write(b"" if moved else data)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            base = f"http://127.0.0.1:{server.server_port}"
            assert same(open_picture(f"{base}/my photo.png"), photo)
            assert same(open_picture(f"{base}/old.png"), photo)
        finally:
            server.shutdown()
            thread.join()


def test_result_is_independent_of_its_source(photo, tmp_path):
    path = tmp_path / "photo.png"
    photo.save(path)
    opened = open_picture(path)
    path.unlink()
    assert same(opened, photo)
    copy = open_picture(photo)
    copy.putpixel((0, 0), (9, 9, 9))
    assert photo.getpixel((0, 0)) != (9, 9, 9)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_no_file_stays_open(photo, tmp_path):
    frames = [photo, photo.rotate(180)]
    for name in ("a.png", "a.gif", "a.tif", "a.webp", "a.bmp", "a.jpg"):
        path = tmp_path / name
        many = name[-3:] in ("gif", "tif", "ebp")
        frames[0].save(path, **({"save_all": True, "append_images": frames[1:]} if many else {}))
        open_picture(path)
    held = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    assert not {str(path) for path in tmp_path.iterdir()} & held


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("-", "standard input"),
        (b"abc", "picture bytes"),
        ("data:image/png;base64,AAAA", "data URL"),
        ("https://me:secret@host.org/a/b.jpg?sig=key#x", "https://host.org/a/b.jpg"),
        ("http://[bad/a.jpg?x", "http://[bad/a.jpg"),
        ("two\nlines.png", "two\\nlines.png"),
        (Path("a/b.png"), "a/b.png"),
        ("", "empty path"),
        (io.BytesIO(b""), "open file"),
        (Image.new("L", (1, 1)), "Pillow picture"),
        (np.zeros((2, 3), np.uint8), "NumPy array (2, 3) of uint8"),
        (None, "object of type NoneType"),
    ],
)
def test_describe_source(source, name):
    assert describe_source(source) == name


def test_long_names_are_shortened():
    assert len(describe_source("x" * 5000)) < 250


# --- modes ---------------------------------------------------------------------------------------


def grey_ramp() -> np.ndarray:
    return np.linspace(0, 255, 16).round().astype(np.uint8).reshape(4, 4)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_modes(mode):
    picture = Image.new("RGB", (4, 4), WHITE)
    if mode == "LAB":
        to_lab = ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        )
        picture = ImageCms.applyTransform(picture, to_lab)
    else:
        picture = picture.convert(mode)
    pixels = np.asarray(open_picture(picture))
    assert pixels.shape == (4, 4, 3)
    assert pixels.min() >= 253


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    ramp = grey_ramp()
    data = encoded(Image.fromarray(ramp.astype(np.uint16) * 257), format)
    assert np.array_equal(np.asarray(open_picture(data))[..., 0], ramp)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (grey_ramp().astype(np.int32), grey_ramp()),
        (grey_ramp().astype(np.int32) * 257, grey_ramp()),
        (grey_ramp().astype(np.int32) * 1_000_000, grey_ramp()),
        (grey_ramp().astype(np.int32) - 100, grey_ramp()),
        (grey_ramp().astype(np.float32) / 255, grey_ramp()),
        (grey_ramp().astype(np.float32), grey_ramp()),
        (grey_ramp().astype(np.float32) * -3e4, 255 - grey_ramp()),
        (np.full((4, 4), -5.0, np.float32), np.zeros((4, 4))),
    ],
)
def test_32_bit_grey(stored, expected):
    for source in (Image.fromarray(stored), encoded(Image.fromarray(stored), "TIFF")):
        assert np.array_equal(np.asarray(open_picture(source))[..., 1], expected)


def test_big_endian_16_bit():
    stored = (grey_ramp().astype(np.uint16) * 257).astype(">u2")
    picture = Image.frombytes("I;16B", (4, 4), stored.tobytes())
    assert np.array_equal(np.asarray(open_picture(picture))[..., 2], grey_ramp())


def test_cmyk_jpeg_is_not_inverted():
    # Pillow writes CMYK the way Adobe does: inverted, with an Adobe marker.
    cmyk = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    data = encoded(cmyk, "JPEG", quality=95)
    assert b"Adobe" in data
    pixel = open_picture(data).getpixel((8, 8))
    assert np.abs(np.subtract(pixel, (200, 40, 90))).max() <= 6


# --- alpha ---------------------------------------------------------------------------------------


def half_transparent(mode: str) -> Image.Image:
    """Left pixel opaque black, right pixel fully transparent, with black stored beneath."""
    return Image.fromarray(np.array([[[0, 0, 0, 255], [0, 0, 0, 0]]], np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_transparent_pixels_show_the_background(mode):
    picture = half_transparent("LA" if mode == "La" else "RGBA").convert(mode)
    assert picture.mode == mode
    if mode == "PA" and picture.getchannel("A").getextrema() == (255, 255):
        pytest.skip("this Pillow loses alpha on the way to PA")
    opened = open_picture(picture)
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [BLACK, WHITE]
    assert open_picture(picture, background=RED).getpixel((1, 0)) == RED


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(np.array([[0, 5]], np.uint8)),
        Image.fromarray(np.array([[[0] * 3, [5] * 3]], np.uint8)),
        Image.fromarray(np.array([[0, 5]], np.uint8)).convert("P"),
    ],
    ids=["L", "RGB", "P"],
)
def test_a_colour_declared_transparent(picture):
    key = (5, 5, 5) if picture.mode == "RGB" else 5
    opened = open_picture(encoded(picture, transparency=key))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [BLACK, WHITE]


def test_palette_with_alpha_table():
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    opened = open_picture(encoded(picture, transparency=bytes([255, 128])))
    assert opened.getpixel((0, 0)) == RED
    assert opened.getpixel((1, 0)) == (127, 127, 255)


def test_background_must_be_a_colour():
    for wrong in [(0, 0), (0, 0, 256), (0.5, 0.5, 0.5)]:
        with pytest.raises(UsageError, match="background"):
            open_picture(Image.new("L", (1, 1)), background=wrong)


# --- orientation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(photo, orientation):
    # How a camera held that way stores the scene: Exif names the side of the scene that row 0
    # and column 0 of the file show.
    scene = np.asarray(photo)
    stored = {
        1: scene,
        2: scene[:, ::-1],
        3: scene[::-1, ::-1],
        4: scene[::-1],
        5: scene.transpose(1, 0, 2),
        6: scene.transpose(1, 0, 2)[::-1],
        7: scene.transpose(1, 0, 2)[::-1, ::-1],
        8: scene.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    as_stored = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "WEBP"):
        data = encoded(as_stored, format, exif=exif, lossless=True)
        assert same(open_picture(data), photo)
        assert same(open_picture(data, orient=False), as_stored)
    # Opened twice, the picture is not turned twice.
    assert same(open_picture(open_picture(data)), photo)


def test_nonsense_in_exif_does_not_matter(photo):
    for exif in (b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03", b""):
        assert open_picture(encoded(photo, "JPEG", exif=exif)).size == photo.size


# --- frames and shapes ---------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_first_frame(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as picture:
        assert getattr(picture, "n_frames", 3) == 3  # Pillow 10 does not know its own MPO again
    assert np.abs(np.subtract(open_picture(data).getpixel((8, 8)), RED)).max() <= 3


def test_a_pillow_picture_stays_at_its_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    data = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as picture:
        picture.seek(1)
        assert open_picture(picture).getpixel((0, 0)) == BLUE


@pytest.mark.parametrize("size", [(1, 1), (1, 10000), (10000, 1)])
def test_extreme_shapes(size):
    assert open_picture(encoded(Image.new("L", size))).size == size


def test_large_panorama_without_a_warning(recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)  # Pillow warns from here to the double
    assert open_picture(encoded(Image.new("1", (1000, 31)))).size == (1000, 31)
    assert not recwarn


# --- NumPy arrays --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1), (4, 4, 3)])
@pytest.mark.parametrize(
    ("dtype", "one"), [("uint8", 255), ("uint16", 65535), ("bool", True), ("f2", 1), ("f8", 1)]
)
def test_arrays(shape, dtype, one):
    array = np.zeros(shape, dtype)
    array[1:3] = one
    pixels = np.asarray(open_picture(array))
    assert pixels.shape == (4, 4, 3)
    assert (pixels[1:3] == 255).all() and (pixels[::3] == 0).all()


def test_array_with_alpha_and_strides():
    array = np.zeros((6, 4, 4), np.uint8)[::2]
    array[0, 0] = (255, 0, 0, 255)
    opened = open_picture(array)
    assert opened.size == (4, 3)
    assert opened.getpixel((0, 0)) == RED and opened.getpixel((1, 0)) == WHITE


def test_float_arrays_round():
    assert open_picture(np.full((1, 1), 0.5)).getpixel((0, 0)) == (128, 128, 128)
