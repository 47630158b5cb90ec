"""Finding a model without a network, and fetching one from a hub that runs on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub, serving

from fastvlm_mlx import hub
from fastvlm_mlx.errors import HubError

ROOT = Path(__file__).parent.parent
REPO = "someone/FastVLM-tiny"
COMPLETE = ("config.json", "tokenizer.json", "model.safetensors")


def fill(folder: Path, *names: str, config: str = '{"model_type": "llava_qwen2"}') -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(config if name == "config.json" else "{}")
    return folder


def put_in_cache(cache: Path, repo: str, *names: str) -> Path:
    """A repository as the hub's library leaves it: a branch that points to a snapshot."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return fill(folder / "snapshots" / COMMIT, *names)


# Finding


def test_a_folder_is_itself(tmp_path: Path, empty_cache: Path) -> None:
    folder = fill(tmp_path / "model", *COMPLETE)
    for name in (folder, str(folder)):
        found = hub.find_model(name)
        assert (found.path, found.source, found.notice) == (folder, "folder", None)


def test_a_folder_wins_over_a_repository_of_its_name(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_cache(empty_cache, REPO, *COMPLETE)
    assert hub.find_model(REPO).source == "cache"
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / REPO, *COMPLETE)
    assert hub.find_model(REPO).source == "folder"


@pytest.mark.parametrize("name", ["./{}", "/nowhere/{}", "~/{}", "../{}", "{}/"])
def test_what_looks_like_a_path_is_never_a_repository(name: str, empty_cache: Path) -> None:
    put_in_cache(empty_cache, REPO, *COMPLETE)
    with pytest.raises(HubError, match="there is no folder"):
        hub.find_model(name.format(REPO))


def test_a_path_object_is_never_a_repository(empty_cache: Path) -> None:
    put_in_cache(empty_cache, REPO, *COMPLETE)
    with pytest.raises(HubError, match="there is no folder"):
        hub.find_model(Path(REPO))


def test_a_file_is_refused(tmp_path: Path, empty_cache: Path) -> None:
    weights = fill(tmp_path, "model.safetensors") / "model.safetensors"
    with pytest.raises(HubError, match="give the folder"):
        hub.find_model(weights)


@pytest.mark.parametrize("name", ["gpt2", "a/b/c", "a b/c", "", "  ", "-a/b", "a//b"])
def test_what_is_neither_folder_nor_repository(name: str, empty_cache: Path) -> None:
    with pytest.raises(HubError):
        hub.find_model(name)


def test_a_repository_that_is_not_here_is_not_fetched(empty_cache: Path) -> None:
    with pytest.raises(HubError, match=f"not on this machine; run: fastvlm-mlx download {REPO}$"):
        hub.find_model(REPO)


@pytest.mark.parametrize(
    "names",
    [
        ("config.json", "tokenizer.json"),
        ("config.json", "model.safetensors"),
        ("config.json", "tokenizer.json", "model-00001-of-00002.safetensors"),
        ("config.json", "tokenizer.json", "training_args.bin"),
    ],
)
def test_an_unfinished_download_is_not_taken_for_a_model(
    names: tuple[str, ...], empty_cache: Path
) -> None:
    put_in_cache(empty_cache, REPO, *names)
    with pytest.raises(HubError, match=f"only partly.*run: fastvlm-mlx download {REPO}"):
        hub.find_model(REPO)


def test_a_broken_link_counts_as_missing(tmp_path: Path) -> None:
    folder = fill(tmp_path / "model", "config.json", "tokenizer.json")
    (folder / "model.safetensors").symlink_to(tmp_path / "never-arrived")
    assert hub.missing_files(folder) == ["model.safetensors"]


def test_the_index_says_which_shards_there_must_be(tmp_path: Path) -> None:
    folder = fill(tmp_path / "model", "config.json", "tokenizer.json", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert hub.missing_files(folder) == ["b.safetensors"]


def test_a_revision_is_looked_up_by_its_name(empty_cache: Path) -> None:
    snapshot = put_in_cache(empty_cache, REPO, *COMPLETE)
    (snapshot.parents[1] / "refs" / "v2").write_text(COMMIT)
    assert hub.find_model(f"{REPO}@v2").path == snapshot
    assert hub.find_model(f"{REPO}@{COMMIT}").path == snapshot
    with pytest.raises(HubError):
        hub.find_model(f"{REPO}@v3")


# The default


def test_the_variable_comes_first(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_cache(empty_cache, hub.DEFAULT_REPO, *COMPLETE)
    folder = fill(tmp_path / "mine", *COMPLETE)
    monkeypatch.setenv(hub.MODEL_VARIABLE, str(folder))
    assert hub.find_model().path == folder
    monkeypatch.setenv(hub.MODEL_VARIABLE, "nobody/nothing")
    with pytest.raises(HubError, match=r"nobody/nothing.*FASTVLM_MODEL"):
        hub.find_model()


def test_then_the_default_repository_if_it_is_complete(empty_cache: Path) -> None:
    snapshot = put_in_cache(empty_cache, hub.DEFAULT_REPO, *COMPLETE)
    found = hub.find_model()
    assert (found.path, found.name, found.notice) == (snapshot, hub.DEFAULT_REPO, None)


@pytest.mark.parametrize("partly", [True, False])
def test_else_the_bundled_model_with_a_line_that_says_so(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, partly: bool
) -> None:
    if partly:
        put_in_cache(empty_cache, hub.DEFAULT_REPO, "config.json")
    monkeypatch.setattr(hub, "BUNDLED", fill(tmp_path / "demo", *COMPLETE))
    found = hub.find_model()
    assert found.source == "bundled"
    assert found.notice is not None
    assert found.notice.endswith(f"fastvlm-mlx download {hub.DEFAULT_REPO}")
    assert hub.find_model("demo").notice is None


def test_no_model_at_all(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "BUNDLED", tmp_path / "absent")
    with pytest.raises(HubError, match="fastvlm-mlx download"):
        hub.find_model()


def test_cached_models_are_listed_with_what_they_lack(empty_cache: Path) -> None:
    put_in_cache(empty_cache, "a/FastVLM-x", *COMPLETE)
    put_in_cache(empty_cache, "b/renamed", "config.json", "tokenizer.json")
    other = put_in_cache(empty_cache, "c/language-model", *COMPLETE)
    fill(other, "config.json", config='{"model_type": "qwen2"}')
    listed = {model.name: model.missing for model in hub.cached_models()}
    assert listed == {"a/FastVLM-x": (), "b/renamed": ("model.safetensors",)}


# Choosing files


def test_safetensors_are_preferred_and_the_rest_is_left_alone() -> None:
    names = [
        "README.md", "config.json", "generation_config.json", "tokenizer_config.json", "vocab.json",
        "merges.txt", "chat_template.jinja", "llava_qwen.py", "model.safetensors",
        "pytorch_model.bin", "pytorch_model.bin.index.json",
        "training_args.bin", "images/cat.png", "onnx/model.onnx",
        "fastvithd.mlpackage/Manifest.json", "fastvithd.mlpackage/Data/weights/weight.bin",
    ]  # fmt: skip
    assert hub.files_needed(names) == [
        "chat_template.jinja", "config.json", "fastvithd.mlpackage/Data/weights/weight.bin",
        "fastvithd.mlpackage/Manifest.json", "generation_config.json", "merges.txt",
        "model.safetensors", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip


def test_bin_where_there_are_no_safetensors() -> None:
    names = ["pytorch_model.bin", "optimizer.bin", "training_args.bin", "config.json"]
    assert hub.files_needed(names) == ["config.json", "pytorch_model.bin"]


def test_what_a_training_run_keeps_in_bin_comes_along() -> None:
    names = ["adapter_model.safetensors", "adapter_config.json", "non_lora_trainables.bin"]
    assert hub.files_needed(names) == sorted(names)


def test_a_repository_without_weights() -> None:
    with pytest.raises(HubError, match="no weights"):
        hub.files_needed(["config.json", "onnx/model.onnx"])


# Fetching


@pytest.fixture
def server() -> Iterator[FakeHub]:
    files = {
        "config.json": b'{"model_type": "llava_qwen2"}',
        "tokenizer.json": b"{}",
        "model.safetensors": os.urandom(64)
        * 375_000,  # 24 MB: the hub's library writes 10 MB at a time
        "README.md": b"not needed",
    }
    with serving(FakeHub(REPO, files)) as running:
        yield running


def command(server: FakeHub, tmp_path: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("FASTVLM_", "HF_"))}
    surroundings |= {
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
        **env,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "fastvlm_mlx", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=surroundings,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def blobs(tmp_path: Path) -> Path:
    return tmp_path / "hub" / f"models--{REPO.replace('/', '--')}" / "blobs"


def test_download_then_find_without_a_network(server: FakeHub, tmp_path: Path) -> None:
    status, out, err = finish(command(server, tmp_path, "download", REPO))
    assert status == 0, err
    snapshot = Path(out.strip())
    assert sorted(path.name for path in snapshot.iterdir()) == sorted(COMPLETE)
    assert (snapshot / "model.safetensors").read_bytes() == server.files["model.safetensors"]
    assert f"--model {REPO}" in err
    assert server.downloads("model.safetensors") == [None]

    server.requests.clear()
    script = f"from fastvlm_mlx import find_model; print(find_model({REPO!r}).path)"
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": server.url,
        "PYTHONPATH": str(ROOT),
    }
    found = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert found.stdout.strip() == str(snapshot)
    assert server.requests == []


def test_ctrl_c_keeps_what_has_arrived_and_the_next_run_goes_on(
    server: FakeHub, tmp_path: Path
) -> None:
    server.stall_after = 21_000_000
    process = command(server, tmp_path, "download", REPO)
    assert server.stalled.wait(60)
    (partial,) = _eventually(
        lambda: [p for p in blobs(tmp_path).glob("*.partial") if p.stat().st_size]
    )
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert status == 130
    assert out == ""
    assert "Traceback" not in err
    assert "goes on from there" in err
    kept = partial.stat().st_size
    assert kept >= 10_000_000

    server.stall_after = None
    server.requests.clear()
    status, out, err = finish(command(server, tmp_path, "download", REPO))
    assert status == 0, err
    assert server.downloads("model.safetensors") == [f"bytes={kept}-"]
    weights = Path(out.strip()) / "model.safetensors"
    assert weights.read_bytes() == server.files["model.safetensors"]
    assert list(blobs(tmp_path).glob("*.partial")) == []


def _eventually(found, seconds: float = 30):  # type: ignore[no-untyped-def]
    import time

    for _ in range(int(seconds / 0.05)):
        if result := found():
            return result
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def test_a_partial_file_that_does_not_fit_is_thrown_away(server: FakeHub, tmp_path: Path) -> None:
    digest = hashlib.sha256(server.files["model.safetensors"]).hexdigest()
    blobs(tmp_path).mkdir(parents=True)
    partial = blobs(tmp_path) / f"{digest}.partial"
    partial.write_bytes(b"something else")
    status, _, err = finish(command(server, tmp_path, "download", REPO))
    assert status == 1
    assert "did not arrive intact" in err
    assert not partial.exists()


@pytest.mark.parametrize(
    ("trouble", "arguments", "message"),
    [
        ({}, ["nobody/nothing"], "there is no model nobody/nothing"),
        ({}, [REPO, "--revision", "v9"], "no such revision"),
        ({"gated": True}, [REPO], "accept its terms"),
        ({"status": 403}, [REPO], "hf auth login"),
        ({"status": 500}, [REPO], "status 500"),
        ({"pretend_size": 10**15}, [REPO], "make room"),
        ({"url": "http://127.0.0.1:9"}, [REPO], "check the network"),
        ({"files": {"config.json": b"{}"}}, [REPO], "no weights"),
    ],
    ids=[
        "unknown",
        "revision",
        "gated",
        "forbidden",
        "broken",
        "disk",
        "unreachable",
        "no-weights",
    ],
)
def test_trouble_is_one_line(
    server: FakeHub, tmp_path: Path, trouble: dict[str, object], arguments: list[str], message: str
) -> None:
    for name, value in trouble.items():
        setattr(server, name, value)
    status, out, err = finish(command(server, tmp_path, "download", *arguments))
    assert status == 1
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert message in err


def test_offline_is_one_line(server: FakeHub, tmp_path: Path) -> None:
    status, _, err = finish(command(server, tmp_path, "download", REPO, HF_HUB_OFFLINE="1"))
    assert status == 1
    assert err.startswith("error: ") and "HF_HUB_OFFLINE" in err
    assert server.requests == []


def test_a_full_disk_while_writing(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    with pytest.raises(HubError, match="the disk is full"), hub._explained(REPO):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["gpt2", "./a/b", "a/b/c", ""])
def test_only_repositories_can_be_downloaded(name: str) -> None:
    with pytest.raises(HubError, match="OWNER/NAME"):
        hub.download(name)
