"""Which model is meant, where it lies, and how to fetch it.

Only `download` ever touches the network. `find_model` looks at folders and at the local cache of
`huggingface_hub`, whose layout (`models--OWNER--NAME/snapshots/COMMIT/...`) is documented and
shared with every other tool that uses it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from fastvlm_mlx.errors import HubError

DEFAULT_REPO = "apple/FastVLM-0.5B"
MODEL_VARIABLE = "FASTVLM_MODEL"
BUNDLED = Path(__file__).parent / "assets" / "demo"
BUNDLED_NAME = "demo"

# OWNER/NAME with an optional @REVISION. The hub allows letters, digits, '-', '_' and '.', and no
# leading '.' or '-'.
_REPO = re.compile(
    r"(?P<repo>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII
)
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")

_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
_ALWAYS = ("*.json", "*.jinja", "merges.txt", "tokenizer.model", "*.tiktoken")
# The parts of a LLaVA training run that exist as .bin only, whatever the rest is stored in.
_BIN_ONLY = ("mm_projector.bin", "non_lora_trainables.bin")
_NEVER_WEIGHTS = ("training_args.bin", "optimizer*.bin", "scheduler*.bin", "rng_state*.bin")
# Files below this size are fetched again rather than resumed.
_WORTH_RESUMING_BYTES = 8 << 20


@dataclass(frozen=True)
class FoundModel:
    """A model on this machine.

    `name` is what to call it, `source` how it was found, `notice` a line for the person when it is
    not what they may expect (None otherwise).
    """

    path: Path
    name: str
    source: Literal["folder", "cache", "bundled"]
    notice: str | None = None


@dataclass(frozen=True)
class CachedModel:
    """A model in the hub's local cache. `missing` names what an interrupted download has left
    out.
    """

    name: str
    path: Path
    bytes: int
    missing: tuple[str, ...]


def find_model(name: str | os.PathLike[str] | None = None) -> FoundModel:
    """Finds a model on this machine; never downloads.

    `name` is a folder, `OWNER/NAME` or `OWNER/NAME@REVISION` of a hub repository, or "demo" for the
    bundled model. An existing folder wins over a repository of the same name; what starts with `.`,
    `/` or `~` is a path and nothing else. Without a name: the variable FASTVLM_MODEL, else
    apple/FastVLM-0.5B if it is completely in the cache, else the bundled demo model.

    Raises HubError, which says what to do, if there is no such model here.
    """
    if name is not None:
        return _named_model(name)
    if wanted := os.environ.get(MODEL_VARIABLE, "").strip():
        try:
            return _named_model(wanted)
        except HubError as error:
            raise HubError(f"{error} (asked for by {MODEL_VARIABLE})") from None
    if path := cached_snapshot(DEFAULT_REPO):
        return FoundModel(path, DEFAULT_REPO, "cache")
    return _bundled_model(
        notice="using the small bundled demo model; for the real one run: "
        + download_command(DEFAULT_REPO)
    )


def _named_model(name: str | os.PathLike[str]) -> FoundModel:
    text = os.fspath(name)
    if not text.strip():
        raise HubError("the model's name is empty: give a folder or OWNER/NAME of a hub repository")
    path = Path(text).expanduser()
    if path.is_dir():
        return FoundModel(path, text, "folder")
    if path.is_file():
        raise HubError(f"{text} is a file: give the folder that holds config.json and the weights")
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.endswith("/"):
        raise HubError(f"there is no folder {text}")
    if text == BUNDLED_NAME:
        return _bundled_model()
    if (match := _REPO.fullmatch(text)) is None:
        raise HubError(
            f"there is no folder {text}, and it is not the name of a hub repository (OWNER/NAME)"
        )
    if snapshot := cached_snapshot(match["repo"], match["revision"]):
        return FoundModel(snapshot, text, "cache")
    state = (
        "only partly on this machine"
        if _repo_folder(match["repo"]).is_dir()
        else "not on this machine"
    )
    raise HubError(f"{text} is {state}; run: {download_command(text)}")


def _bundled_model(notice: str | None = None) -> FoundModel:
    if not (BUNDLED / "config.json").is_file():
        raise HubError(
            "no model is here, and this installation lacks the bundled demo model; "
            f"run: {download_command(DEFAULT_REPO)}, or name one with --model"
        )
    return FoundModel(BUNDLED, "the bundled demo model", "bundled", notice)


def download_command(name: str) -> str:
    """The command that fetches a model, ready to be pasted."""
    return f"fastvlm-mlx download {name}"


def cache_folder() -> Path:
    """The folder that `huggingface_hub` keeps its downloads in (HF_HOME and HF_HUB_CACHE move
    it).
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _repo_folder(repo: str) -> Path:
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def cached_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The folder of a repository in the local cache, or None unless it is complete. No network."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):  # None, or the mark for "known not to exist"
        return None
    folder = Path(config).parent
    return None if missing_files(folder) else folder


def cached_models() -> list[CachedModel]:
    """The FastVLM models in the local cache, complete or not, by name."""
    models = []
    for repo_folder in sorted(cache_folder().glob("models--*--*")):
        _, owner, repo = repo_folder.name.split("--", 2)
        snapshots = [path for path in (repo_folder / "snapshots").glob("*") if path.is_dir()]
        if not snapshots:
            continue
        snapshot = max(snapshots, key=lambda path: path.stat().st_mtime)
        if "fastvlm" in repo.lower() or _model_type(snapshot) in (
            "llava_qwen2",
            "fast_vlm",
            "fastvlm",
        ):
            size = sum(path.stat().st_size for path in snapshot.rglob("*") if path.is_file())
            models.append(
                CachedModel(f"{owner}/{repo}", snapshot, size, tuple(missing_files(snapshot)))
            )
    return models


def _model_type(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config.get("model_type"))
    except (OSError, ValueError, AttributeError):
        return None


def missing_files(folder: Path) -> list[str]:
    """What a model folder lacks to be loaded, judged by names alone: the configuration, weights,
    shards, a tokenizer.
    """
    here = {
        path.name for path in folder.iterdir() if path.exists()
    }  # a broken link is an unfinished download
    missing = [] if "config.json" in here else ["config.json"]
    if not here.intersection(_TOKENIZERS):
        missing.append("tokenizer.json")
    weights = [
        name
        for name in here
        if name.endswith((".safetensors", ".bin")) and not _matches(name, _NEVER_WEIGHTS)
    ]
    if not weights:
        missing.append("model.safetensors")
    expected: set[str] = set()
    for name in weights:
        if shard := _SHARD.fullmatch(name):
            count = int(shard["count"])
            expected |= {
                f"{shard['stem']}-{i:05}-of-{count:05}{shard['suffix']}"
                for i in range(1, count + 1)
            }
    if "model.safetensors.index.json" in here:
        expected |= _indexed_files(folder / "model.safetensors.index.json")
    return missing + sorted(expected - here)


def _indexed_files(index: Path) -> set[str]:
    try:
        return {
            str(name)
            for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def files_needed(names: Iterable[str]) -> list[str]:
    """Of a repository's files, those that loading needs: safetensors (.bin only where there are
    none), configuration, tokenizer, and the Core ML encoder of Apple's exports. Raises HubError if
    there are no weights among them.
    """
    names = sorted(names)
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors")]
    if not weights:
        weights = [
            name for name in top if name.endswith(".bin") and not _matches(name, _NEVER_WEIGHTS)
        ]
    weights += [name for name in top if name in _BIN_ONLY and name not in weights]
    if not weights:
        raise HubError("there are no weights in it that can be read (.safetensors or .bin)")
    rest = [name for name in top if _matches(name, _ALWAYS)]
    if any(name.endswith(".safetensors") for name in weights):
        rest = [name for name in rest if not name.endswith(".bin.index.json")]
    encoders = [name for name in names if fnmatch(name, "*.mlpackage/*")]
    return sorted({*weights, *rest, *encoders})


def download(name: str, revision: str | None = None) -> FoundModel:
    """Fetches a model into the hub's local cache, with progress bars on standard error, and returns
    where it lies.

    Goes on where an earlier download was cut off. `name` is OWNER/NAME or OWNER/NAME@REVISION.
    Raises HubError, with what to do, if it is unknown, closed to this account, out of reach, or too
    large for the disk.
    """
    match = _REPO.fullmatch(name)
    if match is None:
        raise HubError(
            f"{name!r} is not the name of a hub repository: OWNER/NAME, such as {DEFAULT_REPO}"
        )
    repo, revision = match["repo"], revision or match["revision"]
    label = f"{repo}@{revision}" if revision else repo

    from huggingface_hub import HfApi, hf_hub_url, snapshot_download

    from fastvlm_mlx.resume import fetch_blob, hidden_bars

    with _explained(label):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        try:
            wanted = files_needed(sizes)
        except HubError as error:
            raise HubError(f"{label} cannot be used: {error}") from None
        storage = _repo_folder(repo)
        _check_space(label, storage, {file: sizes[file] for file in wanted})
        for file in wanted:
            if sizes[file] >= _WORTH_RESUMING_BYTES:
                fetch_blob(hf_hub_url(repo, file, revision=info.sha), storage / "blobs", file)
        snapshot = snapshot_download(
            repo, revision=revision, allow_patterns=wanted, tqdm_class=hidden_bars()
        )
    if missing := missing_files(Path(snapshot)):
        raise HubError(f"{label} is downloaded but cannot be used: it has no {', '.join(missing)}")
    return FoundModel(Path(snapshot), label, "cache")


def _check_space(label: str, storage: Path, sizes: dict[str, int]) -> None:
    """Refuses a download that cannot fit, before the first byte. What lies in the cache already is
    counted as done.
    """
    from fastvlm_mlx.text import human_bytes

    present = sum(path.stat().st_size for path in (storage / "blobs").glob("*") if path.is_file())
    needed = sum(sizes.values()) - present
    parent = next(path for path in (storage, *storage.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise HubError(
            f"{label} needs {human_bytes(needed)} more, and the disk of {parent} has "
            f"{human_bytes(free)} free; make room, or set HF_HOME to a folder on another disk"
        )


@contextmanager
def _explained(label: str) -> Iterator[None]:
    """Turns whatever goes wrong between here and the hub into one line that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    again = "run the same command again: what has arrived is kept"
    unknown = (
        f"there is no model {label} on the hub (check the spelling; if it is private, "
        "run: hf auth login)"
    )
    try:
        yield
    except HubError:
        raise
    except OfflineModeIsEnabled:
        raise HubError(
            f"cannot download {label}: HF_HUB_OFFLINE forbids it; unset it and try again"
        ) from None
    except GatedRepoError as error:  # a subclass of RepositoryNotFoundError, so it comes first
        raise HubError(
            f"{label} is given only to those who accept its terms: do so at "
            f"{constants.ENDPOINT}/{label.split('@')[0]}, run: hf auth login, and try again"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{label}: the repository is there, but it has no such revision") from error
    except RepositoryNotFoundError as error:
        raise HubError(unknown) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise HubError(
                f"the hub refuses {label} to this account; run: hf auth login"
            ) from error
        if status == 404:
            raise HubError(unknown) from error
        raise HubError(f"the hub failed on {label} (status {status}); later, {again}") from error
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"cannot reach the hub at {constants.ENDPOINT}; check the network and {again}"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise HubError(f"the disk is full; make room and {again}") from error
        raise HubError(f"cannot download {label}: {error}; {again}") from error
    except Exception as error:
        # The hub's HTTP library is its own affair (httpx in one version, another in the next): told
        # by its module.
        if type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore", "requests")):
            raise HubError(
                f"lost the hub at {constants.ENDPOINT} ({error}); check the network and {again}"
            ) from error
        raise
