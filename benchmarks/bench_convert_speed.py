"""How long does a conversion take, beside a plain copy and mlx-vlm's converter? As JSON.

    python benchmarks/bench_convert_speed.py CHECKPOINT [--repeat 3] [--mlx-vlm VENV/bin/python]

CHECKPOINT is a folder in the published PyTorch layout (a real one, or what
`benchmarks/synthetic_checkpoint.py` writes). Each contender runs in a process of its own, in turns,
with the source in the page cache as far as it fits; what is written is forced to the disk. The
bound: without quantising, no more than three times the plain copy. Seconds of the clock are for an
otherwise idle machine; seconds of the CPU and the peak of memory hold on a busy one too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

_COPY = """
import os, shutil, sys
shutil.copytree(sys.argv[1], sys.argv[2])
for name in os.listdir(sys.argv[2]):
    handle = os.open(os.path.join(sys.argv[2], name), os.O_RDONLY)
    os.fsync(handle)
"""
_OURS = """
import json, sys
from fastvlm_mlx.convert import ConvertOptions, convert
convert(sys.argv[1], sys.argv[2], ConvertOptions(**json.loads(sys.argv[3])))
"""
# Imports alone, to be taken off the conversion that follows them.
_IMPORT = "import fastvlm_mlx.convert.pipeline"
_MLX_VLM = """
import os, sys
from mlx_vlm.convert import convert
convert(sys.argv[1], sys.argv[2], **eval(sys.argv[3]))
for name in os.listdir(sys.argv[2]):
    handle = os.open(os.path.join(sys.argv[2], name), os.O_RDONLY)
    os.fsync(handle)
"""
_ASK_MLX_VLM = "from importlib.metadata import version; print(version('mlx-vlm'))"


def contenders(other: str | None) -> dict[str, list[str]]:
    """Name -> command, to which source and target are put after the script."""
    own = sys.executable
    listed = {
        "plain copy": [own, "-c", _COPY],
        "imports alone": [own, "-c", _IMPORT],
        "fastvlm-mlx": [own, "-c", _OURS, "{}"],
        "fastvlm-mlx, no hash of the source": [own, "-c", _OURS, '{"hash_source": false}'],
        "fastvlm-mlx, 4 bits": [own, "-c", _OURS, '{"bits": 4}'],
    }
    if other is not None:
        listed["mlx-vlm"] = [other, "-c", _MLX_VLM, "{}"]
        listed["mlx-vlm, 4 bits"] = [other, "-c", _MLX_VLM, "dict(quantize=True, q_bits=4)"]
    return listed


def run(command: list[str], source: Path) -> dict[str, float | str]:
    """Clock, CPU and peak memory of one command, with a new target that is removed again."""
    place = Path(tempfile.mkdtemp(prefix="fastvlm-speed-", dir=source.parent))
    line = [*command[:3], str(source), str(place / "target"), *command[3:]]
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        child = subprocess.Popen(line, stdout=log, stderr=log)
        _, status, used = os.wait4(child.pid, 0)
        clock = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        shutil.rmtree(place)
        if child.returncode:
            log.seek(0)
            return {"failed": log.read().decode(errors="replace").strip().splitlines()[-1][:300]}
    scale = 1 if sys.platform == "darwin" else 1 << 10
    return {
        "clock_s": clock,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss * scale / 1e6,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--mlx-vlm", help="the Python of an environment that has mlx-vlm")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    source = given.checkpoint.resolve()
    commands = contenders(given.mlx_vlm)
    runs: dict[str, list[dict[str, float | str]]] = {name: [] for name in commands}
    for _ in range(given.repeat):
        for name, command in commands.items():
            runs[name].append(run(command, source))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    table: dict[str, Any] = {}
    for name, found in runs.items():
        failed = [one["failed"] for one in found if "failed" in one]
        table[name] = (
            {"failed": failed[0]}
            if failed
            else {
                key: round(statistics.median(float(one[key]) for one in found), 2)
                for key in ("clock_s", "cpu_s", "peak_mb")
            }
        )
    copied, ours = table["plain copy"], table["fastvlm-mlx"]
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}",
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "mlx": metadata.version("mlx"),
        "checkpoint_gb": round(sum(f.stat().st_size for f in source.iterdir()) / 1e9, 2),
        "median_of": given.repeat,
        "results": table,
    }
    if given.mlx_vlm:
        asked = subprocess.run(
            [given.mlx_vlm, "-c", _ASK_MLX_VLM], capture_output=True, text=True, check=True
        )
        result["mlx_vlm"] = asked.stdout.strip()
    kept = True
    if "clock_s" in ours and "clock_s" in copied:
        result["times_a_plain_copy"] = round(ours["clock_s"] / copied["clock_s"], 2)
        kept = result["times_a_plain_copy"] <= 3
    text = json.dumps(result, indent=2)
    print(text)
    if given.output is not None:
        given.output.write_text(text + "\n")
    return 0 if kept else 1


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    raise SystemExit(main())
