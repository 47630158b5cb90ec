"""Whatever is wrong with a picture, the error is a PictureError of one line that names it."""

import io
import os
import socket
import threading
import warnings
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvlm_mlx.errors import PictureError
from fastvlm_mlx.processing import pictures
from fastvlm_mlx.processing.pictures import open_picture

NOISE = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, format)
    return buffer.getvalue()


def message(source) -> str:
    """The error's text, checked for form."""
    with pytest.raises(PictureError) as caught:
        open_picture(source)
    text = str(caught.value)
    name, colon, rest = text.partition(": ")
    assert name and colon and rest and text.isprintable(), text  # isprintable excludes newlines
    assert caught.value.exit_code == 2
    return text


# --- files ---------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    path = tmp_path / "gone.png"
    assert message(path) == f"{path}: there is no such file; check the path"


def test_folder(tmp_path):
    assert "it is a folder" in message(tmp_path)


def test_empty_file(tmp_path):
    (tmp_path / "empty.png").touch()
    assert "empty.png: it is empty" in message(tmp_path / "empty.png")
    assert message(b"").startswith("picture bytes: it is empty")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_no_permission(tmp_path):
    path = tmp_path / "secret.png"
    path.touch(mode=0)
    assert "permission" in message(path)


def test_no_permission_reported(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "secret.png"
    path.touch()
    monkeypatch.setattr("builtins.open", refuse)
    assert "there is no permission to read it" in message(path)


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 5000, "", "file://elsewhere/a.png"])
def test_impossible_paths(path):
    message(path)


def test_base64_without_its_prefix_is_recognised():
    assert "data:image/jpeg;base64," in message("/9j/4AAQSkZJRg" * 500)


def test_name_with_newline(tmp_path):
    assert "two\\nlines.png: there is no such file" in message(tmp_path / "two\nlines.png")


# --- contents ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"just some words\nin lines\n", "it is text"),
        (b"  <!DOCTYPE html><html>", "web page"),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (b"%PDF-1.7\n", "PDF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\0\0\0\x20ftypisom", "video"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (b"\xff\xd8", "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "EPS"),
        (bytes(range(128, 256)), "no picture of a known kind"),
    ],
)
def test_other_kinds_of_files(data, expected):
    assert expected in message(data)


def test_heic_without_its_plugin_names_the_plugin(monkeypatch):
    monkeypatch.setattr(pictures, "_register_heif", lambda: None)
    assert "pillow-heif" in message(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_cut_short(format, part):
    data = encoded(format)
    data = data[: int(len(data) * part)]
    try:
        text = message(data)
    except pytest.fail.Exception:
        # A few formats fill up what is missing; then it must at least be a picture.
        assert format == "JPEG2000"
        assert open_picture(data).size == (48, 48)
    else:
        assert "damaged or cut short" in text


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    format=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO"]),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1),
    keep=st.floats(0, 1),
)
def test_damaged_bytes_give_a_picture_or_a_picture_error(format, places, keep):
    data = bytearray(encoded(format))
    for place, value in places:
        # Mostly in the header, where damage leads the readers astray.
        data[int(place**3 * len(data))] = value
    try:
        picture = open_picture(bytes(data[: int(len(data) * keep) + 1]))
    except PictureError as error:
        assert str(error).isprintable()
    else:
        assert picture.mode == "RGB"


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes(data):
    with pytest.raises(PictureError):
        open_picture(data)


def test_decompression_bomb(monkeypatch):
    png = bytearray(encoded("PNG"))
    png[16:24] = (20000).to_bytes(4, "big") * 2  # IHDR; its checksum is not verified on opening
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    assert "it is too large" in message(bytes(png))
    # The limit holds even where the program has switched Pillow's own off.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "its 20000x20000 pixels are more than 179 megapixels" in message(bytes(png))


def test_warnings_turned_into_errors_do_not_matter(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # 48 * 48 draws a warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_picture(encoded("PNG")).size == (48, 48)


def test_not_enough_memory(monkeypatch):
    def fail(self):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", fail)
    assert "memory" in message(Image.new("RGB", (2, 2)))


# --- objects -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((3, 8, 8), np.uint8), "transpose(1, 2, 0)"),
        (np.zeros((8, 8, 2), np.uint8), "(H, W, 3)"),
        (np.zeros((1, 8, 8, 3), np.uint8), "(H, W, 3)"),
        (np.zeros(5, np.uint8), "(H, W, 3)"),
        (np.zeros((4, 4), np.int64), ".astype(numpy.uint8)"),
        (np.zeros((4, 4), object), ".astype(numpy.uint8)"),
        (np.full((4, 4), 200.0), "must lie in [0, 1]; divide by 255"),
        (np.full((4, 4), -0.1), "must lie in [0, 1]"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.full((4, 4), np.inf), "NaN"),
    ],
)
def test_arrays_that_are_no_pictures(array, expected):
    assert expected in message(array)


def test_pictures_of_pillow_that_cannot_be_used():
    assert "no pixels" in message(Image.new("RGB", (0, 5)))
    assert "NaN" in message(Image.fromarray(np.full((2, 2), np.nan, np.float32)))
    closed = Image.open(io.BytesIO(encoded("PNG")))
    closed.close()
    message(closed)
    message(Image.open(io.BytesIO(encoded("PNG")[:4000])))  # cut short, found out on loading


def test_files_that_cannot_be_used():
    assert "mode 'rb'" in message(io.StringIO("text"))
    used_up = io.BytesIO(encoded("PNG"))
    used_up.read()
    assert "empty" in message(used_up)
    used_up.close()
    assert "closed file" in message(used_up)


def test_other_objects():
    class Tensor:
        def __array__(self):
            raise AssertionError

    assert "give a path" in message(None)
    assert "give a path" in message(42)
    assert "numpy.asarray" in message(Tensor())


def test_streams_have_a_size_limit(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_BYTES", 1 << 20)
    assert "larger than 1 MiB" in message(io.BytesIO(bytes((1 << 20) + 1)))


def test_nothing_on_standard_input(monkeypatch):
    class Terminal:
        buffer = io.BytesIO()

        def isatty(self):
            return True

    for stdin in (Terminal(), None):
        monkeypatch.setattr("sys.stdin", stdin)
        assert message("-").startswith("standard input: no picture is coming in")


# --- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,@@@@", "base64 is broken"),
        ("data:image/png;base64,", "empty"),
        ("data:text/plain,hello", "it is text"),
        ("ftp://host/a.png", "ftp: addresses are not supported"),
        ("s3://bucket/a.png", "s3: addresses are not supported"),
        ("http://me:secret@127.0.0.1:1/a.png", "with a password is not supported"),
        ("http://", "download failed"),
        ("http:///a.png", "download failed"),
        ("http://[bad/a.png", "download failed"),
        ("http://127.0.0.1:99999/a.png", "download failed"),
        ("http://127.0.0.1:1/a.png", "download failed"),
    ],
)
def test_addresses_that_lead_nowhere(url, expected):
    text = message(url)
    assert expected in text
    assert "secret" not in text


class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        kind = self.path[1:].partition("?")[0]
        if kind.isdigit():
            return self.send_error(int(kind))
        if kind == "ftp":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/a.png")
            return self.end_headers()
        if kind == "loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            return self.end_headers()
        self.send_response(200)
        if kind == "short":
            self.send_header("Content-Length", "5000")
        self.end_headers()
        if kind == "silent":
            return self.server.hold.wait(5)
        self.wfile.write(b"<html>no picture here</html>" if kind == "page" else bytes(100))

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = HTTPServer(("127.0.0.1", 0), Server)
    server.hold = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.hold.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("404?token=secret", "the server answered 404 Not Found"),
        ("500", "the server answered 500"),
        ("loop", "the server answered 302"),
        ("ftp", "ftp"),
        ("page", "it is a web page"),
        ("zeros", "no picture of a known kind"),
        ("short", "stopped after 100 of 5000 bytes"),
    ],
)
def test_servers_that_give_no_picture(server, path, expected):
    text = message(f"{server}/{path}")
    assert expected in text
    assert "secret" not in text


def test_server_that_stays_silent(server, monkeypatch):
    monkeypatch.setattr(pictures, "DOWNLOAD_TIMEOUT_S", 0.05)
    assert "silent" in message(f"{server}/silent")
    with socket.socket() as listener:  # accepts, but never answers
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert "silent" in message(f"http://127.0.0.1:{listener.getsockname()[1]}/a.png")
