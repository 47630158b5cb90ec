"""Large files that survive an interruption.

`huggingface_hub` resumes a file while one call lasts, but drops the partial file when the call
ends: a Ctrl-C near the end of a 15 GB shard would cost the whole shard. Here a large file goes into
the hub's own cache, under the name that the hub would give it, by way of a partial file that stays;
the hub's `snapshot_download` then finds it there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastvlm_mlx.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub.utils import tqdm

_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch_blob(url: str, blobs: Path, name: str) -> Path:
    """Downloads `url` into the folder `blobs` of a repository's cache, going on from what an
    earlier call has left.

    Returns the path of the finished file. Raises HubError if another process is at it, or if the
    content is not what the hub announced; errors of the network are left to the caller.
    """
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    meta = get_hf_file_metadata(url)
    if meta.etag is None:
        raise HubError(f"the hub does not say which version of {name} it has; try again later")
    blob = blobs / meta.etag
    if blob.exists():
        return blob
    blobs.mkdir(parents=True, exist_ok=True)
    location = meta.location or url
    headers = build_hf_headers()
    if urlsplit(location).netloc != urlsplit(url).netloc:
        headers.pop(
            "authorization", None
        )  # the token is for the hub, not for the store that it points to

    partial = blobs / f"{meta.etag}.partial"
    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HubError(f"another process is downloading {name}; wait for it to end") from None
        start = file.tell()
        if meta.size is not None and start > meta.size:
            file.truncate(0)
            start = 0
        http_get(
            location,
            file,
            resume_size=start,
            headers=headers,
            expected_size=meta.size,
            displayed_filename=name,
        )
        file.flush()
        # A file in two pieces may be of two versions. The hub names large files by their SHA-256,
        # which settles it.
        if start and _SHA256.fullmatch(meta.etag) and _sha256(partial) != meta.etag:
            partial.unlink()
            raise HubError(
                f"{name} did not arrive intact and was thrown away; run the same command again"
            )
        os.replace(partial, blob)
    return blob


def hidden_bars() -> type[tqdm]:
    """Progress bars that do not show, for files too small to wait for."""
    from huggingface_hub.utils import tqdm

    class Hidden(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return Hidden


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
