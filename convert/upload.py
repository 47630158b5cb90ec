"""A converted folder to a repository on the hub, through `huggingface_hub`.

Three steps, so that a person (or a program) can look before anything leaves this machine:
`plan_upload` looks at the folder, `UploadPlan.question` says what would happen, `upload` does it.
A repository that has to be made is private unless asked otherwise: making a model public later is
one click, and taking it back is impossible. One that exists keeps its visibility.

`huggingface_hub` sends large files first and names them in a commit at the end. An upload that is
cut off therefore leaves the repository as it was, and the same command sends only what is missing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import HubError, UsageError
from fastvlm_mlx.hub import missing_files
from fastvlm_mlx.text import human_bytes

# OWNER/NAME: letters, digits, '-', '_', '.'; 96 characters; no '--' or '..' (huggingface_hub's own
# rules, checked here so that nothing is asked of the network before the name is right).
_NAME = re.compile(r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII)
_LONGEST_NAME = 96

# What a model folder consists of. Anything else in it stays at home.
_SENT = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.md",
    "*.txt",
    "tokenizer.model",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
)
_AGAIN = "nothing was changed there; the same command goes on from where it stopped"


@dataclass(frozen=True)
class UploadPlan:
    """What would be sent where. `private` is for a repository that has to be made."""

    folder: Path
    repo: str
    private: bool
    files: dict[str, int]  # name -> bytes
    left_out: tuple[str, ...]  # names in the folder that are not part of a model

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def question(self) -> str:
        """What to ask a person before `upload`."""
        kind = "private" if self.private else "PUBLIC"
        kept = f"; {', '.join(self.left_out)} stay here" if self.left_out else ""
        return (
            f"Upload {len(self.files)} files ({human_bytes(self.bytes)}) to {self.repo} on the hub "
            f"({kind} if it is new){kept}?"
        )


@dataclass(frozen=True)
class Uploaded:
    """Where it is now."""

    url: str
    commit: str
    files: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {"url": self.url, "commit": self.commit, "files": self.files, "bytes": self.bytes}


def check_repo(repo: str) -> str:
    """`repo` if it is OWNER/NAME. To be called before a conversion of an hour, not after it.

    Raises:
        UsageError: it is no name of a repository.
    """
    parts = repo.split("/")
    fits = len(parts) == 2 and all(_NAME.fullmatch(part) for part in parts)
    forbidden = "--" in repo or ".." in repo or repo.endswith(".git")
    if not fits or forbidden or len(repo) > _LONGEST_NAME:
        raise UsageError(
            f"{repo!r} is not a name for a hub repository: give OWNER/NAME, such as "
            "your-name/FastVLM-0.5B-4bit"
        )
    return repo


def plan_upload(folder: str | Path, repo: str, *, private: bool = True) -> UploadPlan:
    """Look at what would be sent. No network.

    Raises:
        UsageError: not a repository's name, or no folder.
        HubError: the folder is no complete model.
    """
    check_repo(repo)
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder} to upload")
    missing = missing_files(folder)
    if missing:
        raise HubError(
            f"{folder} is not uploaded: it is no complete model, {missing[0]} is missing"
        )
    files, left_out = {}, []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_file() and any(fnmatch(entry.name, pattern) for pattern in _SENT):
            files[entry.name] = entry.stat().st_size
        else:
            left_out.append(entry.name)
    return UploadPlan(folder, repo, private, files, tuple(left_out))


def upload(
    plan: UploadPlan,
    *,
    confirm: Callable[[str], bool] | None,
    message: str = "Converted with fastvlm-mlx",
    ignore_offline: bool = False,
) -> Uploaded:
    """Make the repository if need be, and send the folder as one commit.

    Args:
        confirm: asked with the plan's question; None for a yes given beforehand (`--yes`).
        ignore_offline: send although `huggingface_hub` has been told to stay offline in this
            process. For our own commands, which tell it so while they load models.

    Raises:
        HubError: in one line what the hub or the network objects to, and what to do about it.
        UsageError: the answer was no.
    """
    if confirm is not None and not confirm(plan.question()):
        raise UsageError(f"not uploaded; {plan.folder} is complete and stays as it is")

    from huggingface_hub import HfApi, constants

    with _explained(plan, constants.ENDPOINT), _surroundings(ignore_offline):
        api = HfApi()
        api.create_repo(plan.repo, private=plan.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=plan.repo,
            folder_path=plan.folder,
            allow_patterns=sorted(plan.files),
            commit_message=message,
        )
    return Uploaded(f"{constants.ENDPOINT}/{plan.repo}", commit.oid, len(plan.files), plan.bytes)


@contextmanager
def _surroundings(ignore_offline: bool) -> Iterator[None]:
    """Let this process reach the hub for as long as the block lasts; bars on a terminal only."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    offline, quiet = constants.HF_HUB_OFFLINE, are_progress_bars_disabled()
    if ignore_offline:
        constants.HF_HUB_OFFLINE = False
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        if not quiet:
            enable_progress_bars()


@contextmanager
def _explained(plan: UploadPlan, endpoint: str) -> Iterator[None]:
    """Turn whatever goes wrong on the way into one line."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (HubError, UsageError):
        raise
    except OfflineModeIsEnabled as error:
        raise HubError(
            f"cannot upload to {plan.repo}: HF_HUB_OFFLINE forbids it; unset it and try again"
        ) from error
    except LocalTokenNotFoundError as error:
        raise HubError(
            f"cannot upload to {plan.repo}: not logged in; run: hf auth login"
        ) from error
    except HfHubHTTPError as error:
        raise HubError(_said(plan, error)) from error
    except Exception as error:
        # A file's upload fails inside a RuntimeError that names it; the reason is what it is from.
        reason = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        if isinstance(reason, HfHubHTTPError):
            raise HubError(_said(plan, reason)) from error
        # The HTTP library of huggingface_hub is its own affair: told by its module's name.
        library = type(reason).__module__.partition(".")[0]
        if library.startswith(("httpx", "httpcore", "requests")) or isinstance(reason, OSError):
            what = str(reason) or type(reason).__name__
            raise HubError(
                f"the upload to {plan.repo} on {endpoint} was cut off ({what}); {_AGAIN}"
            ) from error
        if isinstance(reason, ValueError):  # an answer that is not the hub's
            raise HubError(
                f"{endpoint} did not answer as a hub does ({reason}); "
                f"look at what {plan.repo} holds before trying again"
            ) from error
        raise


def _said(plan: UploadPlan, error: Any) -> str:
    """The line for an HTTP status."""
    status = error.response.status_code if error.response is not None else 0
    words = " ".join(str(getattr(error, "server_message", None) or "").split())
    said = f" ({words})" if words else ""
    owner = plan.repo.split("/")[0]
    if status == 401:
        return f"the hub does not know who is uploading to {plan.repo}{said}; run: hf auth login"
    if status == 403:
        return (
            f"this account may not write to {plan.repo}{said}; use a token with write access, "
            f"and an owner other than {owner} if that is not you"
        )
    if status == 404:
        return f"the hub has no {plan.repo} and no owner {owner} to make it for{said}"
    if status in (409, 412):
        return f"{plan.repo} was changed by someone else meanwhile{said}; {_AGAIN}"
    if status == 413:
        return f"the hub finds the files of {plan.repo} too large{said}; use a smaller --shard-size"
    if status == 429:
        return f"the hub asks to slow down{said}; wait some minutes: {_AGAIN}"
    if status == 400:
        return f"the hub refuses the upload to {plan.repo}{said}"
    return f"the hub failed on {plan.repo} (status {status}){said}; try again later: {_AGAIN}"


__all__ = ["UploadPlan", "Uploaded", "check_repo", "plan_upload", "upload"]
