"""Does a conversion that is stopped ever leave half a model? Every moment of it, as JSON.

    python benchmarks/kill_converter.py [--random 200] [--seed 0]

A small conversion is stopped by SIGKILL and by SIGINT at every one of its operations on files, and
by SIGKILL at random times, onto a new target and over an old one. After each, the target has to be
absent, the old model or the new one, to the byte; then a second conversion has to succeed and leave
nothing beside the target (after SIGINT, nothing may be left even before it).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "convert"))

import tiny
from killing import Zygote, beside, state_of, whole


class Trial:
    """Old and new, made once, and what is to be said of each stop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.zygote = Zygote()
        self.sources = [tiny.write(folder / f"source-{seed}", seed=seed) for seed in (1, 2)]
        self.made = [folder / f"made-{i}" / "model" for i in (0, 1)]
        for source, target in zip(self.sources, self.made, strict=True):
            self.usual = self.zygote.order(source, target)
            if self.usual["status"]:
                raise SystemExit(f"the conversion itself fails: {self.usual}")
        self.old, self.new = map(state_of, self.made)

    def stop(self, number: int, replace: bool, how: dict[str, Any]) -> tuple[str, str | None]:
        """(what was found at the target, what is wrong with it or None)."""
        target = self.folder / f"turn-{number}" / "model"
        if replace:
            shutil.copytree(self.made[0], target)
        answer = self.zygote.order(self.sources[1], target, overwrite=replace, **how)
        state = state_of(target)
        names = {str(None): "absent", str(self.old): "old", str(self.new): "new"}
        found = names.get(str(state), "HALF")
        fault = None
        if found == "HALF" or found == ("absent" if replace else "old"):
            fault = f"found {found}"
        elif state is not None and not whole(target):
            fault = "a header does not open"
        elif answer["status"] == 130 and beside(target):
            fault = f"left {beside(target)}"
        ended = {0: "finished", 130: "interrupted", -9: "killed"}.get(answer["status"], "error")
        if ended == "error":
            fault = fault or f"ended with {answer}"
        again = self.zygote.order(self.sources[1], target, overwrite=True)
        if fault is None and (again["status"] or state_of(target) != self.new or beside(target)):
            fault = f"the next run: {again}, beside it {beside(target)}"
        shutil.rmtree(target.parent)
        return f"{ended}, {found}", fault


def stops(usual: dict[str, Any], random_stops: int, seed: int) -> list[dict[str, Any]]:
    """Every operation on files with either signal, and random times."""
    listed: list[dict[str, Any]] = [
        {"signal": int(number), "at_event": event}
        for number in (signal.SIGKILL, signal.SIGINT)
        for event in range(1, usual["events"] + 8)  # replacing takes some more
    ]
    dice = random.Random(seed)
    listed += [
        {"signal": int(signal.SIGKILL), "after_s": dice.uniform(0, usual["seconds"])}
        for _ in range(random_stops)
    ]
    return listed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--random", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.perf_counter()
    outcomes: dict[str, Counter[str]] = {"new target": Counter(), "overwrite": Counter()}
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder))
        listed = stops(trial.usual, given.random, given.seed)
        number = 0
        for name, counts in outcomes.items():
            for how in listed:
                number += 1
                outcome, fault = trial.stop(number, name == "overwrite", how)
                counts[f"{signal.Signals(how['signal']).name}: {outcome}"] += 1
                if fault is not None:
                    faults.append({"target": name, "how": how, "fault": fault})
        trial.zygote.close()
    result = {
        "stops": number,
        "file_operations_of_a_conversion": trial.usual["events"],
        "seed": given.seed,
        "outcomes": {name: dict(sorted(counts.items())) for name, counts in outcomes.items()},
        "faults": faults[:20],
        "wall_s": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(result, indent=2))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
