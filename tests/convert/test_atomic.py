"""Never half a model: killed, interrupted, out of room, in a race.

`benchmarks/kill_converter.py` does the same with every operation on files, and many more times.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
from fastvlm_mlx.convert import ConvertOptions, convert
from fastvlm_mlx.convert.target import TargetError
from killing import State, Zygote, beside, state_of, whole

KILLS = 8  # of a new target, and as many of one that is replaced


class Scene(NamedTuple):
    """Two sources, what becomes of each, and how a conversion usually goes."""

    old_source: Path
    new_source: Path
    old_made: Path
    old: State
    new: State
    events: int
    seconds: float


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Scene:
    folder = tmp_path_factory.mktemp("scene")
    sources = [tiny.write(folder / f"source-{seed}", seed=seed) for seed in (1, 2)]
    states, answer = [], {}
    for i, source in enumerate(sources):
        target = folder / f"made-{i}" / "model"
        answer = zygote.order(source, target)
        assert answer["status"] == 0, answer
        state = state_of(target)
        assert state and whole(target)
        states.append(state)
    assert states[0] != states[1]
    old_made = folder / "made-0" / "model"
    return Scene(*sources, old_made, *states, answer["events"], answer["seconds"])


def put_old(scene: Scene, target: Path) -> None:
    shutil.copytree(scene.old_made, target)
    assert state_of(target) == scene.old


@pytest.mark.parametrize("replace", [False, True], ids=["new", "overwrite"])
def test_killed_at_any_moment(scene: Scene, zygote: Zygote, tmp_path: Path, replace: bool) -> None:
    dice = random.Random(int(replace))
    killed = 0
    for turn in range(KILLS):
        target = tmp_path / str(turn) / "model"
        if replace:
            put_old(scene, target)
        if turn % 2:
            how: dict[str, Any] = {"after_s": dice.uniform(0, scene.seconds)}
        else:
            how = {"at_event": dice.randint(1, scene.events)}
        answer = zygote.order(
            scene.new_source, target, overwrite=replace, signal=int(signal.SIGKILL), **how
        )
        killed += answer["status"] == -signal.SIGKILL
        found = state_of(target)
        assert found in ((scene.old, scene.new) if replace else (None, scene.new)), how
        assert found is None or whole(target)
        # The next one cleans up after it, whatever it has left.
        answer = zygote.order(scene.new_source, target, overwrite=True)
        assert answer["status"] == 0, (how, answer)
        assert state_of(target) == scene.new
        assert beside(target) == []
    assert killed >= KILLS // 2


@pytest.mark.parametrize("replace", [False, True], ids=["new", "overwrite"])
def test_ctrl_c_leaves_nothing(scene: Scene, zygote: Zygote, tmp_path: Path, replace: bool) -> None:
    dice = random.Random(10 + int(replace))
    stopped = 0
    for turn in range(5):
        target = tmp_path / str(turn) / "model"
        if replace:
            put_old(scene, target)
        # Not before the target's folder exists, and not while the last files are being removed.
        event = dice.randint(3, scene.events - 6)
        answer = zygote.order(
            scene.new_source,
            target,
            overwrite=replace,
            signal=int(signal.SIGINT),
            at_event=event,
        )
        stopped += answer["status"] == 130
        found = state_of(target)
        assert found in ((scene.old, scene.new) if replace else (None, scene.new)), event
        assert beside(target) == [], event
    assert stopped >= 3


def test_two_at_once_on_one_target(scene: Scene, tmp_path: Path, zygote: Zygote) -> None:
    other = Zygote()
    try:
        for turn in range(3):
            target = tmp_path / str(turn) / "model"
            zygote.start(scene.old_source, target)
            other.start(scene.new_source, target)
            answers = [zygote._read(), other._read()]
            statuses = [answer["status"] for answer in answers]
            assert sorted(statuses) == [0, 1], answers
            error = answers[statuses.index(1)]["error"]
            assert "another conversion is writing" in error or "is there already" in error
            assert state_of(target) == (scene.old, scene.new)[statuses.index(0)]
            assert beside(target) == []
    finally:
        other.close()


def test_what_is_there_is_kept_without_overwrite(
    scene: Scene, zygote: Zygote, tmp_path: Path
) -> None:
    target = tmp_path / "model"
    put_old(scene, target)
    answer = zygote.order(scene.new_source, target)
    assert answer["status"] == 1 and "--overwrite" in answer["error"]
    assert state_of(target) == scene.old
    assert beside(target) == []


@pytest.mark.parametrize("replace", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails(
    scene: Scene,
    zygote: Zygote,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replace: bool,
    code: int,
) -> None:
    target = tmp_path / "model"
    if replace:
        put_old(scene, target)
    original, calls = os.pwrite, []

    def pwrite(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) > 30:
            raise OSError(code, os.strerror(code))
        return original(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(TargetError) as caught:
        options = ConvertOptions(overwrite=replace, hash_source=False)
        convert(scene.new_source, target, options)
    assert "\n" not in str(caught.value)
    full = code in (errno.ENOSPC, errno.EDQUOT)
    assert ("is full" if full else "cannot be written") in str(caught.value)
    assert state_of(target) == (scene.old if replace else None)
    assert beside(target) == []


# With a file system of its own ---------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MB: room for the old model and the new one, and little more."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def mounted_again(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


@pytest.mark.parametrize("replace", [False, True], ids=["new", "overwrite"])
def test_a_disk_that_fills_up_on_the_way(
    scene: Scene, zygote: Zygote, small_disk: Path, replace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted_again(small_disk, "size=200m")  # more than is asked for beforehand
    target = small_disk / "model"
    if replace:
        put_old(scene, target)
    answer = zygote.order(scene.new_source, target, overwrite=replace, fill=True)
    assert answer["status"] == 1, answer
    assert "is full" in answer["error"] and "\n" not in answer["error"]
    assert state_of(target) == (scene.old if replace else None)
    assert beside(target) == []
    answer = zygote.order(scene.new_source, target, overwrite=True)  # the filler is gone by now
    assert answer["status"] == 0, answer
    assert state_of(target) == scene.new


def test_too_small_a_disk_is_refused_before_anything_is_written(
    scene: Scene, zygote: Zygote, small_disk: Path
) -> None:
    answer = zygote.order(scene.new_source, small_disk / "model")
    assert answer["status"] == 1
    assert "free and" in answer["error"] and "needed" in answer["error"]
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_cannot_be_written(scene: Scene, zygote: Zygote, small_disk: Path) -> None:
    mounted_again(small_disk, "ro")
    answer = zygote.order(scene.new_source, small_disk / "model")
    assert answer["status"] == 1
    assert "cannot be written" in answer["error"] and "\n" not in answer["error"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(scene: Scene, zygote: Zygote, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    answer = zygote.order(scene.new_source, tmp_path / "model")
    tmp_path.chmod(0o755)
    assert answer["status"] == 1 and "cannot be written" in answer["error"]
