"""Open a picture from wherever it is and make it plain RGB, or say in one line why not.

    source -> bytes or pixels -> Pillow picture, loaded -> RGB without alpha, 8 bits -> upright

Everything that can go wrong with a picture goes wrong here, as a `PictureError`: what comes back is
in memory, upright, opaque and 8-bit, and no later step has to think of files.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import http.client
import io
import os
import re
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from fastvlm_mlx.errors import PictureError, UsageError

__all__ = ["MAX_BYTES", "MAX_PIXELS", "PictureSource", "describe_source", "open_picture"]

PictureSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray"
)

MAX_PIXELS = 178_956_970
"""Largest picture in pixels: where Pillow, by default, refuses a file as a decompression bomb."""

MAX_BYTES = 256 * 2**20
"""Most bytes taken from a web address, standard input or any other stream."""

DOWNLOAD_TIMEOUT_S = 30.0
"""How long a web server may stay silent."""

_HINT = "give a path, a web address, bytes, an open file, a Pillow picture or a NumPy array"

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of the EXIF tag Orientation (Exif 2.32, section 4.6.4)."""


_WARNINGS = threading.Lock()
"""Filters of warnings belong to the whole process: only one thread may set and restore them."""


class _Problem(Exception):
    """What is wrong and what to do; `open_picture` puts the source's name in front."""


def open_picture(
    source: PictureSource,
    *,
    orient: bool = True,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """Open any picture as a loaded, independent Pillow picture in mode RGB.

    Of an animation or a file of several pages the first frame is taken; of a Pillow picture, the
    frame it stands at. Grey values deeper than 8 bits are scaled, not clipped. Colour profiles are
    ignored, as in the reference.

    Transparent pixels show `background`, white by default. The reference calls `convert("RGB")`,
    which drops alpha and uncovers whatever colour was stored under it, often black or noise that
    nobody has ever seen. Logos, charts and screenshots with transparency are drawn for a white
    page, and black lettering on a transparent ground would vanish on black.

    Args:
        source: a path, an http(s), file or data URL, "-" for standard input, encoded bytes, a file
            open for binary reading (read from where it stands, left open), a Pillow picture, or a
            NumPy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool, or floats
            in [0, 1].
        orient: turn the picture as its EXIF orientation says. The reference does not. Pillow itself
            always turns TIFF and AVIF, and pillow-heif HEIC.
        background: what to put under transparent pixels, 0 to 255 each.

    Raises:
        PictureError: for every way in which the picture cannot be had, as one line.
        UsageError: `background` is not a colour.
    """
    if len(background) != 3 or not all(isinstance(x, int) and 0 <= x <= 255 for x in background):
        raise UsageError(f"background {background!r} must be three whole numbers from 0 to 255")
    try:
        return _open(source, orient, background)
    except _Problem as problem:
        reason = _shorten(" ".join(str(problem).split()), limit=500)
        raise PictureError(f"{describe_source(source)}: {reason}") from problem.__cause__


def describe_source(source: object) -> str:
    """A short name of a source for messages: one line, without passwords or signatures of URLs."""
    if isinstance(source, bytes | bytearray | memoryview):
        return "picture bytes"
    if isinstance(source, np.ndarray):
        return f"NumPy array {source.shape} of {source.dtype}"
    if isinstance(source, Image.Image):
        return _shorten(getattr(source, "filename", "")) or "Pillow picture"
    if isinstance(source, str | os.PathLike):
        text = os.fsdecode(source)
        if text == "-":
            return "standard input"
        if text[:5].lower() == "data:":
            return "data URL"
        if _scheme(text):
            return _shorten(
                re.sub(r"^([^:]+://)(?:[^/?#]*@)?([^?#]*).*", r"\1\2", text, flags=re.S)
            )
        return _shorten(text) or "empty path"
    if hasattr(source, "read"):
        name = getattr(source, "name", None)
        return _shorten(name) if isinstance(name, str) and name else "open file"
    return f"object of type {type(source).__name__}"


def _shorten(text: str | bytes, limit: int = 240) -> str:
    """Printable and on one line, the middle left out if it is long."""
    text = os.fsdecode(text)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


# --- from a source to a Pillow picture -----------------------------------------------------------


def _open(source: Any, orient: bool, background: tuple[int, int, int]) -> Image.Image:
    try:
        if isinstance(source, np.ndarray):
            return _finish(_from_array(source), orient, background)
        if isinstance(source, Image.Image):
            return _finish(source, orient, background)
        with _open_stream(source) as stream:
            return _decode(stream, orient, background)
    except _Problem:
        raise
    except Image.DecompressionBombError as error:
        raise _Problem(f"it is too large ({error}); make it smaller first") from error
    except MemoryError as error:
        raise _Problem("there is not enough memory for it; make it smaller first") from error
    except Exception as error:  # Pillow's readers let all kinds of errors out on a damaged file
        reason = str(error) or type(error).__name__
        raise _Problem(f"it is damaged or cut short ({reason}); fetch or save it again") from error


def _decode(stream: BinaryIO, orient: bool, background: tuple[int, int, int]) -> Image.Image:
    head = stream.read(512)
    if not head:
        raise _Problem("it is empty (0 bytes); fetch or save it again")
    stream.seek(0)
    if _is_heif(head):
        _register_heif()
    try:
        # Pillow warns of large pictures long before it refuses them, and of odd metadata.
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(stream)
    except UnidentifiedImageError as error:
        raise _Problem(_what_it_is(head)) from error
    with picture:
        if picture.format == "EPS":  # Pillow would run Ghostscript on it
            raise _Problem("EPS is a drawing, not a picture; export it as PNG")
        return _finish(picture, orient, background)


@contextlib.contextmanager
def _open_stream(source: Any) -> Iterator[BinaryIO]:
    """A seekable binary stream of the encoded picture, closed afterwards if it is ours."""
    path: str | None = None
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str | os.PathLike):
        text = os.fsdecode(source)
        scheme = _scheme(text)
        if text == "-":
            data = _read_standard_input()
        elif scheme == "data":
            data = _read_data_url(text)
        elif scheme in ("http", "https"):
            data = _download(text)
        elif scheme in ("", "file"):
            path = _file_path(text) if scheme else os.path.expanduser(text)
        else:
            raise _Problem(f"{scheme}: addresses are not supported; use http, https or a path")
    elif hasattr(source, "read"):
        data = _read_object(source)
    else:
        advice = "pass numpy.asarray(it)" if hasattr(source, "__array__") else _HINT
        raise _Problem(f"that is not a picture; {advice}")

    if path is None:
        with io.BytesIO(data) as stream:
            yield stream
        return
    with _open_path(path) as file:
        if file.seekable():
            yield file
        else:  # a pipe with a name, such as a shell's <(command)
            with io.BytesIO(_read_all(file)) as stream:
                yield stream


def _scheme(text: str) -> str:
    """The scheme of a URL in lower case; "" for a path (a single letter is a Windows drive)."""
    match = re.match(r"(data):|([a-z][a-z0-9+.-]+)://", text, re.IGNORECASE)
    return (match[1] or match[2]).lower() if match else ""


def _file_path(url: str) -> str:
    address = urllib.parse.urlsplit(url)
    if address.netloc not in ("", "localhost"):
        raise _Problem("a file address must name this machine; use file:///path")
    return urllib.request.url2pathname(address.path)


def _open_path(path: str) -> BinaryIO:
    if not path:
        raise _Problem(f"no picture is named; {_HINT}")
    try:
        if os.path.isdir(path):
            raise _Problem("it is a folder; name one picture in it")
        return open(path, "rb")
    except FileNotFoundError as error:
        raise _Problem("there is no such file; check the path") from error
    except PermissionError as error:
        raise _Problem("there is no permission to read it; change that or copy it") from error
    except OSError as error:
        advice = "check the path"
        if error.errno == errno.ENAMETOOLONG:
            advice = "if this is base64, put 'data:image/jpeg;base64,' in front"
        raise _Problem(f"it cannot be opened ({error.strerror}); {advice}") from error
    except ValueError as error:
        raise _Problem(f"that is no path ({error}); check it") from error


def _read_all(stream: Any) -> bytes:
    """Everything that is left in a stream, up to MAX_BYTES."""
    chunks: list[bytes] = []
    total = 0
    while True:
        chunk = stream.read(1 << 20)
        if not chunk:
            return b"".join(chunks)
        if not isinstance(chunk, bytes | bytearray | memoryview):
            raise _Problem("it gives text instead of bytes; open it with mode 'rb'")
        total += len(chunk)
        if total > MAX_BYTES:
            raise _Problem(f"it is larger than {MAX_BYTES >> 20} MiB; make it smaller first")
        chunks.append(bytes(chunk))


def _read_object(stream: Any) -> bytes:
    try:
        return _read_all(stream)
    except (OSError, ValueError) as error:
        raise _Problem(f"reading failed ({error}); open it for binary reading") from error


def _read_standard_input() -> bytes:
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None or sys.stdin.isatty():
        raise _Problem("no picture is coming in; pipe one, as in: command - < photo.jpg")
    return _read_all(stream)


def _read_data_url(url: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma:
        raise _Problem("it has no comma; the form is data:image/png;base64,...")
    data = urllib.parse.unquote_to_bytes(body)
    if not header.lower().rstrip().endswith(";base64"):
        return data
    try:
        data = b"".join(data.split())
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _Problem(f"its base64 is broken ({error}); encode the picture again") from error


def _download(url: str) -> bytes:
    if re.match(r"[^:]+://[^/?#]*@", url):
        raise _Problem("an address with a password is not supported; download the picture first")
    # Spaces and letters outside ASCII are common in pasted addresses; what is escaped stays so.
    quoted = urllib.parse.quote(url.strip(), safe="%/:=&?~#+!$,;'@()*[]")
    # Only web handlers, so that no redirection leads to another kind of address.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    try:
        request = urllib.request.Request(quoted, headers={"User-Agent": "fastvlm-mlx"})
        with opener.open(request, timeout=DOWNLOAD_TIMEOUT_S) as response:
            data = _read_all(response)
            expected = response.headers.get("Content-Length", "")
    except urllib.error.HTTPError as error:
        error.close()
        reason = f"{error.code} {error.reason}"
        raise _Problem(f"the server answered {reason}; check the address") from error
    except TimeoutError as error:
        raise _slow_server(error) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise _slow_server(error) from error
        raise _Problem(
            f"the download failed ({error.reason}); check the address and the network"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise _Problem(f"the download failed ({reason}); check the address") from error
    if expected.isdigit() and len(data) < int(expected):
        raise _Problem(f"the download stopped after {len(data)} of {expected} bytes; try again")
    return data


def _slow_server(error: Exception) -> _Problem:
    return _Problem(f"the server was silent for {DOWNLOAD_TIMEOUT_S:g} s; try again later")


# --- what it is when it is not a picture ---------------------------------------------------------

_MAGIC = (b"\x89PNG", b"\xff\xd8", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"8BPS")


def _is_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in (
        *(b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"),
    )


def _register_heif() -> None:
    """Let Pillow read HEIC if pillow-heif is installed."""
    try:
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return
    pillow_heif.register_heif_opener()


def _what_it_is(head: bytes) -> str:
    """A guess from the first bytes of something that Pillow does not know, and what to do."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if _is_heif(head):
        return "HEIC needs the pillow-heif package (pip install pillow-heif), or save it as JPEG"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF needs Pillow 11.3 or later, or save it as PNG"
    if head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3":
        return "it is a video, not a picture; save one frame of it"
    if head[:2] == b"\xff\x0a" or head[4:8] == b"JXL ":
        return "JPEG XL is not supported; save it as PNG"
    if head.startswith(b"%PDF"):
        return "it is a PDF, not a picture; export the page as PNG"
    if text.startswith((b"<!doctype html", b"<html")):
        return "it is a web page, not a picture; use the address of the picture itself"
    if text.startswith((b"<svg", b"<?xml")) and b"<svg" in text:
        return "SVG is a drawing, not a picture; export it as PNG"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the picture; run git lfs pull"
    if head.startswith(_MAGIC):
        return "it is damaged or cut short; fetch or save it again"
    try:
        if text.decode("ascii").replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
            return "it is text, not a picture; give a PNG or JPEG file, for example"
    except UnicodeDecodeError:
        pass
    return "it is no picture of a known kind; save it as PNG or JPEG"


# --- from a Pillow picture to upright RGB --------------------------------------------------------


def _finish(picture: Image.Image, orient: bool, background: tuple[int, int, int]) -> Image.Image:
    width, height = picture.size
    if not width or not height:
        raise _Problem(f"it has no pixels ({width}x{height}); give another")
    if width * height > MAX_PIXELS:
        limit = f"{MAX_PIXELS / 1e6:.0f} megapixels"
        raise _Problem(f"its {width}x{height} pixels are more than {limit}; make it smaller first")
    picture.load()
    turn = _TURNS.get(_orientation(picture)) if orient else None
    upright = _to_rgb(picture, background)
    if turn is not None:
        upright = upright.transpose(turn)
    upright.info = {}  # no EXIF may stay: it would turn the picture a second time
    return upright


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or the EXIF data are broken."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
        return value if isinstance(value, int) else 1
    except Exception:  # broken metadata raise all kinds of errors; the pixels are still good
        return 1


def _to_rgb(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        picture = Image.fromarray(_deep_grey_to_8_bits(np.asarray(picture)))
    keyed = picture.mode in ("1", "L", "P", "RGB") and "transparency" in picture.info
    if not keyed and not {"A", "a"} & set(picture.getbands()):
        return picture.convert("RGB")
    if picture.mode == "La":  # premultiplied; Pillow has no direct way from here
        picture = picture.convert("LA")
    page = Image.new("RGBA", picture.size, (*background, 255))
    page.alpha_composite(picture.convert("RGBA"))
    return page.convert("RGB")


def _deep_grey_to_8_bits(grey: np.ndarray) -> np.ndarray:
    """(H, W) of 16-bit, 32-bit or float grey -> (H, W) uint8.

    Sixteen-bit files have a full scale, 65535. Integers and floats of 32 bits have none that is
    agreed upon: values that fit one of the usual ranges ([0, 1] for floats, [0, 255], [0, 65535])
    are read so, and otherwise the smallest becomes black and the largest white.
    """
    if grey.dtype.kind == "f" and not np.isfinite(grey).all():
        raise _Problem("it holds values that are not finite (NaN or infinity); replace them")
    low, high = float(grey.min()), float(grey.max())
    if grey.dtype.itemsize == 2:
        low, high = 0.0, 65535.0
    elif low >= 0:
        scales = (1.0, 255.0) if grey.dtype.kind == "f" else (255.0, 65535.0)
        low, high = next(((0.0, s) for s in scales if high <= s), (low, high))
    span = high - low or 1.0  # one value throughout becomes black
    levels: np.ndarray = np.rint((grey.astype(np.float64) - low) * (255 / span))
    return levels.astype(np.uint8)


def _from_array(array: np.ndarray) -> Image.Image:
    """A NumPy array -> Pillow picture in mode L, RGB or RGBA."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        advice = "give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            advice = "channels come last here, so use array.transpose(1, 2, 0)"
        raise _Problem(f"that shape is no picture; {advice}")
    if array.size == 0:
        raise _Problem("it has no pixels; give another")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = np.rint(array / 257).astype(np.uint8)
    elif array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise _Problem("it holds values that are not finite (NaN or infinity); replace them")
        low, high = float(array.min()), float(array.max())
        if low < 0 or high > 1:
            span = f"{low:g} to {high:g}"
            raise _Problem(f"its floats, {span}, must lie in [0, 1]; divide by 255, for example")
        array = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise _Problem("its type must be uint8, uint16, bool or float; use .astype(numpy.uint8)")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(array))
