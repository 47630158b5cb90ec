"""Unpacking a checkpoint's `.zip`, as Apple ships them, without trusting it.

The members that a conversion needs are unpacked into a folder beside the target and removed with
it. (Reading tensors where they lie in the archive would work for members that are stored, but
Apple's are deflated, and a deflated member cannot be read from its middle.)
"""

from __future__ import annotations

import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from fastvlm_mlx.errors import CheckpointError, HubError
from fastvlm_mlx.hub import files_needed
from fastvlm_mlx.weights.lazy import shown, where

# Weights hardly shrink at all; JSON may, to a tenth. Beyond this it is a bomb.
LARGEST_RATIO = 100
_FREE_BYTES = 1 << 20  # members this small may have any ratio
_MOST_MEMBERS = 10_000
_AT_ONCE = 8 << 20
# Beside what loading needs: what was trained, and on what terms it is given.
_ALSO = ("adapter_model.safetensors", "adapter_model.bin", "license", "readme", "notice", "acknow")


def is_archive(path: Path) -> bool:
    """Whether `path` is a zip with a model folder in it, and not a PyTorch file (a zip as well)."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return path.suffix.lower() == ".zip"
    return not any(name.endswith("/data.pkl") and name.count("/") == 1 for name in names)


def unpack(
    path: Path,
    folder: Path,
    require_space: Callable[[int], None],
    advance: Callable[[int, int], None] = lambda _done, _total: None,
) -> Path:
    """Unpack the model in `path` into `folder`, flat; returns `folder`.

    `require_space(bytes)` is asked before the first byte. Raises CheckpointError, naming the
    member, for anything that an honest archive does not hold.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = model_members(path, archive)
            total = sum(member.file_size for member in members.values())
            require_space(total)
            done = 0
            for name, member in members.items():
                done = _copy(path, archive, member, folder / name, done, total, advance)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where(path)}: is a damaged zip archive ({error})") from error
    except zipfile.zlib.error as error:  # type: ignore[attr-defined]
        raise CheckpointError(f"{where(path)}: is a damaged zip archive ({error})") from error
    return folder


def model_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files of the model in an open archive, by name in its folder. Raises CheckpointError."""
    return _wanted(path, _checked(path, archive.infolist()))


def _checked(path: Path, members: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Members by name; refuses the whole archive for one bad member, needed or not."""
    if len(members) > _MOST_MEMBERS:
        raise CheckpointError(f"{where(path)}: holds {len(members)} files, no model")
    checked: dict[str, zipfile.ZipInfo] = {}
    for member in members:
        name = member.filename
        fault = None
        parts = name.split("/")
        if name.startswith("/") or "\\" in name or ".." in parts or ":" in parts[0] or "\0" in name:
            fault = "leaves the folder"
        elif stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            fault = "is a link or a device, not a file"
        elif member.flag_bits & 0x1:
            fault = "is encrypted"
        elif name in checked:
            fault = "is there twice"
        elif member.file_size > max(_FREE_BYTES, member.compress_size * LARGEST_RATIO):
            fault = (
                f"grows {member.file_size // max(member.compress_size, 1)} times: refused as a bomb"
            )
        if fault is not None:
            raise CheckpointError(f"{where(path)}: the member {shown(name)} {fault}")
        checked[name] = member
    return checked


def _wanted(path: Path, members: dict[str, zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Of the model's own folder in the archive, the files that matter, by name in that folder."""
    visible = {
        name: member
        for name, member in members.items()
        if not member.is_dir()
        and not any(part == "__MACOSX" or part.startswith(".") for part in name.split("/"))
    }
    homes = {
        str(PurePosixPath(name).parent)
        for name in visible
        if PurePosixPath(name).name in ("config.json", "adapter_config.json")
    }
    # Apple's exports hold a Core ML package, which has no config.json but folders of its own.
    if not homes:
        raise CheckpointError(f"{where(path)}: holds no model (no config.json in it)")
    if len(homes) > 1:
        found = ", ".join(shown(home) for home in sorted(homes)[:5])
        raise CheckpointError(f"{where(path)}: holds several models ({found}); unpack it yourself")
    home = homes.pop()
    prefix = "" if home == "." else f"{home}/"
    inside = {
        name.removeprefix(prefix): member
        for name, member in visible.items()
        if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
    }
    try:
        needed = set(files_needed(inside))
    except HubError as error:
        raise CheckpointError(f"{where(path)}: {error}") from None
    needed |= {name for name in inside if name.lower().startswith(_ALSO)}
    return {name: member for name, member in inside.items() if name in needed}


def _copy(
    path: Path,
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    target: Path,
    done: int,
    total: int,
    advance: Callable[[int, int], None],
) -> int:
    """Unpack one member, never more bytes than it declares; zipfile checks the CRC at its end."""
    written = 0
    with archive.open(member) as source, open(target, "xb") as file:
        while chunk := source.read(_AT_ONCE):
            written += len(chunk)
            if written > member.file_size:
                raise CheckpointError(
                    f"{where(path)}: the member {shown(member.filename)} is longer than it says"
                )
            file.write(chunk)
            advance(done + written, total)
    if written != member.file_size:
        raise CheckpointError(f"{where(path)}: the member {shown(member.filename)} is cut")
    shutil.copymode(path, target)
    return done + written
