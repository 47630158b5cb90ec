"""Do the readers of checkpoints survive damaged files? Counts of what happened, as JSON.

    python benchmarks/fuzz_readers.py [--cases 100000] [--seed 0]

Small honest files of each format are damaged at random and read whole. A case may end in two ways:
the tensors are read, or CheckpointError is raised. Anything else is a fault: it is counted, shown
with what reproduces it, and makes the command fail. So does a case that takes over ten
seconds of processor time.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "weights"))

from torch_writer import EDIT_KINDS, KINDS, Edit, mutated, seeds

from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.weights.files import find_non_finite, open_tensors

_SLOW_S = 10.0


def edits_at_random(random_: random.Random) -> list[Edit]:
    count = random_.choice((1, 1, 1, 2, 2, 3, 5, 8))
    # Half the cases keep every byte in its place, which gets further before it is noticed.
    kinds = random_.choice(((0, 1, 5), range(EDIT_KINDS)))
    return [
        (random_.choice(kinds), random_.randrange(65536), random_.randrange(65536))
        for _ in range(count)
    ]


def read_all(path: Path) -> None:
    with open_tensors(path) as tensors:
        for tensor in tensors.values():
            # An expanded tensor may honestly be large; reading a few is enough.
            if tensor.nbytes < 1 << 20:
                tensor.numpy()
                tensor.read()
                find_non_finite(tensor)


def fuzz(cases: int, seed: int) -> dict[str, Any]:
    """Outcomes by kind of file: {"outcomes": {kind: {outcome: count}}, "faults": [...], ...}."""
    honest = seeds()
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    reasons: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    slowest = 0.0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.bin"
        for case in range(cases):
            # A generator of its own, so that a case can be repeated alone.
            random_ = random.Random(f"{seed}:{case}")
            kind = random_.choice(KINDS)
            # Some file systems wait for the disk where a file is overwritten.
            path.unlink(missing_ok=True)
            path.write_bytes(mutated(honest, kind, edits_at_random(random_)))
            start = time.process_time()  # a busy machine is no fault of the reader
            try:
                read_all(path)
                outcome = "read"
            except CheckpointError as error:
                outcome = "refused"
                message = str(error)
                reasons[message.removeprefix(f"{path}: ")[:24]] += 1
                if "\n" in message or str(path) not in message:
                    outcome = "bad message"
            except Exception as error:  # exactly what this program looks for
                outcome = type(error).__name__
            took = time.process_time() - start
            if took > _SLOW_S:
                outcome = "slow"
            slowest = max(slowest, took)
            outcomes[kind][outcome] += 1
            if outcome not in ("read", "refused") and len(faults) < 20:
                faults.append({"seed": seed, "case": case, "kind": kind, "outcome": outcome})
    return {
        "cases": cases,
        "seed": seed,
        "outcomes": {kind: dict(sorted(counts.items())) for kind, counts in outcomes.items()},
        "distinct_reasons": len(reasons),
        "faults": faults,
        "slowest_cpu_ms": round(slowest * 1000, 1),
        "wall_s": round(time.perf_counter() - began, 1),
        # ru_maxrss counts bytes on macOS and KiB elsewhere.
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        // (1 << 20 if sys.platform == "darwin" else 1 << 10),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    result = fuzz(given.cases, given.seed)
    print(json.dumps(result, indent=2))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
