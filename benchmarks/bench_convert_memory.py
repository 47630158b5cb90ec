"""How much memory does a conversion take? Peaks above the baseline, as JSON.

    python benchmarks/bench_convert_memory.py [--sizes 0.5b 7b] [--folder DIR] [--output FILE]

A checkpoint of each size is synthesised (7b: 15.5 GB on disk, and as much again while it is
converted) and converted in a process of its own, as it is and to 4 bits. Two figures are sampled:
memory that the process owns (anonymous pages), and all that is counted to it, which includes pages
of the source that the kernel keeps mapped and would give back at once. The bound of 3 GB for 7b and
1 GB for 0.5b is on the second, the stricter one. The baseline is the process with the converter
imported.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import synthetic_checkpoint

LIMITS_GB = {"0.5b": 1.0, "1.5b": 2.0, "7b": 3.0}
OPTIONS: dict[str, dict[str, Any]] = {"as it is": {}, "4 bits": {"bits": 4}}

_CHILD = """
import json, sys, time
import fastvlm_mlx.convert.pipeline
from fastvlm_mlx.convert import ConvertOptions, convert
print("ready", flush=True)
sys.stdin.readline()
began = time.perf_counter()
report = convert(sys.argv[1], sys.argv[2], ConvertOptions(**json.loads(sys.argv[3])))
print(json.dumps({"seconds": time.perf_counter() - began, "bytes": report.bytes}), flush=True)
"""


def memory(pid: int) -> tuple[int, int]:
    """(anonymous, all) resident bytes of a process, from /proc."""
    values = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("RssAnon", "VmRSS"):
            values[name] = int(rest.split()[0]) << 10
    return values.get("RssAnon", 0), values.get("VmRSS", 0)


def measure(source: Path, target: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Convert in a process of its own, watched every 20 ms."""
    command = [sys.executable, "-c", _CHILD, str(source), str(target), json.dumps(options)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    child.stdout.readline()
    baseline = memory(child.pid)
    peaks = list(baseline)
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                now = memory(child.pid)
            except OSError:
                return
            peaks[:] = map(max, peaks, now)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    child.stdin.write("\n")
    child.stdin.flush()
    line = child.stdout.readline()
    done.set()
    watcher.join()
    if child.wait():
        raise SystemExit("the conversion failed")
    said = json.loads(line)
    own, whole = (peak - base for peak, base in zip(peaks, baseline, strict=True))
    return {
        "seconds": round(said["seconds"], 1),
        "target_gb": round(said["bytes"] / 1e9, 2),
        "baseline_mb": round(baseline[1] / 1e6),
        "own_above_baseline_mb": round(own / 1e6),
        "all_above_baseline_mb": round(whole / 1e6),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=LIMITS_GB, default=["0.5b", "7b"])
    parser.add_argument("--folder", type=Path, help="where there is room; default: a temporary one")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if not Path("/proc/self/status").exists():
        raise SystemExit("this reads /proc, which Linux alone has")
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "mlx": metadata.version("mlx"),
        "cases": [],
    }
    kept = True
    for size in given.sizes:
        place = Path(tempfile.mkdtemp(prefix="fastvlm-memory-", dir=given.folder))
        try:
            nbytes = synthetic_checkpoint.write(place / "source", size)
            for name, options in OPTIONS.items():
                case = measure(place / "source", place / "target", options)
                shutil.rmtree(place / "target")
                within = case["all_above_baseline_mb"] < 1000 * LIMITS_GB[size]
                kept &= within
                result["cases"].append(
                    {
                        "size": size,
                        "source_gb": round(nbytes / 1e9, 2),
                        "options": name,
                        **case,
                        "limit_mb": round(1000 * LIMITS_GB[size]),
                        "within": within,
                    }
                )
                print(json.dumps(result["cases"][-1]), file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    text = json.dumps(result, indent=2)
    print(text)
    if given.output is not None:
        given.output.write_text(text + "\n")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
