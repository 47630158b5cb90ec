"""A process that has imported the converter once and forks for every conversion.

Importing takes seconds, a conversion of the small model a tenth of one: killing dozens of them
needs this. It reads one JSON object a line and answers each with one: the child's exit status (the
negated signal, if one killed it), its error and what it did. The child ends itself, or is ended:

    {"source": ..., "target": ..., "overwrite": true,
     "at_event": 17, "signal": 9}   at its 17th operation on files below the target's folder
     "after_s": 0.02, "signal": 9   after so many seconds
     "fill": true                   when the weights are opened for writing, the disk is filled up
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fastvlm_mlx.convert import ConvertOptions, convert

# What Python reports of the file system (PEP 578); ctypes.* is the exchange of two folders.
_EVENTS = ("open", "os.", "shutil.", "tempfile.", "fcntl.", "ctypes.dlsym", "ctypes.call_function")


def main() -> None:
    import fastvlm_mlx.convert.pipeline  # noqa: F401 - the heavy imports, before any fork

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.TemporaryFile() as log:
            child = os.fork()
            if child == 0:
                os._exit(_convert(order, log.fileno()))
            began = time.perf_counter()
            if "after_s" in order:
                time.sleep(order["after_s"])
                os.kill(child, order["signal"])
            _, status = os.waitpid(child, 0)
            log.seek(0)
            said = json.loads(log.read() or b"{}")
        said |= {"status": os.waitstatus_to_exitcode(status)}
        print(json.dumps({**said, "seconds": time.perf_counter() - began}), flush=True)


def _convert(order: dict[str, Any], log: int) -> int:
    """In the child: convert, and say how it went. Never returns into the parent's loop."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seen = _watch(order)
    said: dict[str, Any] = {}
    status = 0
    try:
        options = ConvertOptions(overwrite=order.get("overwrite", False), hash_source=False)
        convert(order["source"], order["target"], options)
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        status = 1
        said = {"error": str(error), "kind": type(error).__name__}
    os.pwrite(log, json.dumps({**said, "events": seen[0]}).encode(), 0)
    return status


def _watch(order: dict[str, Any]) -> list[int]:
    """Count operations on files; raise the signal at the one that is asked for."""
    near = os.path.realpath(Path(order["target"]).parent)
    seen = [0]
    full = [not order.get("fill", False)]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not event.startswith(_EVENTS):
            return
        if not event.startswith("ctypes") and not any(
            str(near) in os.fsdecode(a)
            for a in arguments
            if isinstance(a, str | bytes | os.PathLike)
        ):
            return
        seen[0] += 1
        if seen[0] == order.get("at_event"):
            if order["signal"] == signal.SIGKILL:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.raise_signal(order["signal"])
        if event == "open" and not full[0] and os.fsdecode(arguments[0]).endswith(".safetensors"):
            full[0] = True
            _fill(near)

    sys.addaudithook(hook)
    return seen


def _fill(folder: str) -> None:
    """Take all but 200 kB of the disk; what fills it is unlinked, and gone with this process."""
    handle, path = tempfile.mkstemp(dir=folder)
    os.unlink(path)
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    os.posix_fallocate(handle, 0, max(free - 200_000, 1))


if __name__ == "__main__":
    main()
