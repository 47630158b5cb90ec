"""Never half a model: everything is written beside the target, then put in its place in one step.

Beside a target `NAME` stand, while a conversion runs and never longer:

| name | what |
| --- | --- |
| `.NAME.lock` | locked by the running conversion; the kernel unlocks it when that process ends |
| `.NAME.partial-PID-XXXX` | the new folder while it is written, or what was unpacked for it |
| `.NAME.old-PID-XXXX` | the old folder, in the fallback below only |

A folder that is there already is exchanged with the new one by one system call (`renameat2` with
RENAME_EXCHANGE on Linux, `renamex_np` with RENAME_SWAP on macOS), so at every moment one of the two
stands whole at the target. File systems without that call (some network ones) get two renames:
a kill between them leaves the old folder, whole, under `.NAME.old-...`, and the next conversion to
that target puts it back before it does anything else.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastvlm_mlx.errors import FastVLMError, UsageError
from fastvlm_mlx.text import human_bytes

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # sys/stdio.h of macOS

# What the kernel answers where the exchange does not exist.
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class TargetError(FastVLMError):
    """The target cannot be written: in the way, in use, no room, no permission."""


class Target:
    """A folder to be made or replaced, locked for as long as the `with` block lasts.

    `self.partial` is the folder to write into; `commit()` puts it in place. Leaving the block
    without that, for whatever reason, leaves the target as it was and nothing beside it.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        # A link stays a link: what it leads to is replaced.
        self.path = Path(os.path.realpath(Path(path).expanduser()))
        self._overwrite = overwrite
        self._lock: int | None = None
        self._made: list[Path] = []  # folders above the target that were not there, deepest first
        self.partial = self.path
        if not self.path.name:
            raise UsageError(f"{path} is no name for a folder to write")

    def refuse_source(self, source: Path) -> None:
        """A conversion never writes where it reads."""
        source = Path(os.path.realpath(source))
        if source == self.path:
            raise UsageError(f"{source} is the source: choose another folder to write")
        if source.is_relative_to(self.path):
            raise UsageError(
                f"{self.path} holds the source {source}: choose another folder to write"
            )
        if self.path.is_relative_to(source) and source.is_dir():
            raise UsageError(f"{self.path} lies inside the source: choose another folder to write")

    def __enter__(self) -> Target:
        with self._explained():
            self._made = [p for p in self.path.parents if not p.exists()]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            locked = self._acquire()
        try:
            with self._explained():
                if locked:
                    self._recover()
                self._refuse_what_is_there()
                self.partial = self.workspace()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # Ctrl-C a second time must not stop the tidying half way: tried again below.
        try:
            self._sweep(own=True)
        finally:
            try:
                self._sweep(own=True)
            finally:
                self._release()

    def workspace(self) -> Path:
        """A new folder beside the target, removed at the end; also by the next run after a kill."""
        prefix = f"{self._hidden('partial')}-{os.getpid()}-"
        return Path(tempfile.mkdtemp(prefix=prefix, dir=self.path.parent))

    def require_space(self, nbytes: int) -> None:
        """Raises TargetError before anything is written, if `nbytes` cannot fit."""
        free = shutil.disk_usage(self.path.parent).free
        if nbytes > free:
            raise TargetError(
                f"{self.path.parent} has {human_bytes(free)} free and {human_bytes(nbytes)} are "
                "needed; make room or choose another disk"
            )

    def commit(self) -> None:
        """Put the folder that was written in place of the target. In one step, or not at all."""
        with self._explained():
            os.chmod(self.partial, 0o777 & ~_umask())  # mkdtemp's is for its owner alone
            for file in self.partial.iterdir():
                sync(file)
            sync(self.partial)
            self._refuse_what_is_there()
            try:
                # Also replaces an empty folder; a full one is an error.
                os.rename(self.partial, self.path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not self._overwrite:
                    raise
                self._replace()
            sync(self.path.parent)

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Around whatever writes: turns what the system refuses into one line."""
        return self._explained()

    # Inside -----------------------------------------------------------------------------------

    def _hidden(self, kind: str) -> str:
        return f".{self.path.name}.{kind}"

    def _replace(self) -> None:
        if exchange(self.partial, self.path):
            return  # the old folder is at `partial` now, and is swept away
        old = Path(
            tempfile.mkdtemp(prefix=f"{self._hidden('old')}-{os.getpid()}-", dir=self.path.parent)
        )
        os.rename(self.path, old)  # onto an empty folder
        os.rename(self.partial, self.path)

    def _refuse_what_is_there(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise TargetError(f"{self.path} is a file: choose another name")
        if not any(self.path.iterdir()):
            return
        if not self._overwrite:
            raise TargetError(f"{self.path} is there already: choose another name, or --overwrite")
        if not (self.path / "config.json").is_file():
            raise TargetError(f"{self.path} holds no model, so --overwrite does not remove it")

    def _acquire(self) -> bool:
        """Lock the target. False where the file system knows no locks."""
        import fcntl

        path = self.path.parent / self._hidden("lock")
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(lock)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise TargetError(
                        f"another conversion is writing {self.path}: wait, or choose another name"
                    ) from None
                return False
            self._lock = lock
            # Whoever held it before may have removed the file between our opening and locking it.
            try:
                if os.path.samestat(os.fstat(lock), os.stat(path)):
                    return True
            except FileNotFoundError:
                pass
            os.close(lock)

    def _release(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path.parent / self._hidden("lock"))
            os.close(self._lock)
            self._lock = None
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for folder in self._made:
                folder.rmdir()

    def _recover(self) -> None:
        """What a killed conversion left: its folder goes; an old model it had set aside returns.

        Having the lock is proof that no living conversion owns any of it.
        """
        for old in self._beside("old"):
            if not self.path.exists() and (old / "config.json").is_file():
                os.rename(old, self.path)
        self._sweep(own=False)

    def _sweep(self, *, own: bool) -> None:
        mine = f"-{os.getpid()}-"
        for kind in ("partial", "old"):
            for left in self._beside(kind):
                if own and mine not in left.name:
                    continue
                if kind == "old" and not self.path.exists():
                    os.rename(left, self.path)  # the second of two renames has failed
                    continue
                shutil.rmtree(left, ignore_errors=True)

    def _beside(self, kind: str) -> list[Path]:
        pattern = re.compile(re.escape(self._hidden(kind)) + r"-\d+-[a-z0-9_]+")
        try:
            return [p for p in self.path.parent.iterdir() if pattern.fullmatch(p.name)]
        except OSError:
            return []

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise TargetError(
                    f"the disk of {self.path.parent} is full; nothing of {self.path.name} was kept"
                ) from error
            raise TargetError(
                f"{self.path} cannot be written ({error.strerror or error})"
            ) from error


def exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step. False where this system or file system cannot; then nothing
    has changed."""
    library = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin":
        call = getattr(library, "renamex_np", None)
        arguments: tuple[object, ...] = (first, second, ctypes.c_uint(_RENAME_SWAP))
    else:
        call = getattr(library, "renameat2", None)  # glibc 2.28, musl 1.2.5
        here = ctypes.c_int(_AT_FDCWD)
        arguments = (here, first, here, second, ctypes.c_uint(_RENAME_EXCHANGE))
    if call is None:
        return False
    if call(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(b))


def sync(path: Path) -> None:
    """Force a file or a folder's list of names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems: not for folders
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
