"""Download single files of a data set's repository on the hub: JSON annotations that `datasets` cannot read as rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

ADDRESS = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def fetch(path: str, files: Sequence[str] = ()) -> Path | None:
    """Return the local copy of `hf://datasets/org/name/file`, or of the first of `files` that the data set has.

    Downloads once, into huggingface_hub's cache. Returns None if `path` has neither form.

    Raises:
        ValueError: the file does not exist, or the hub cannot be reached.
    """
    if found := ADDRESS.fullmatch(path):
        name, revision, file = found.groups()
        return download(path, name, [file], revision)
    if path.startswith("hf://"):
        raise ValueError(f"path={path} is not of the form hf://datasets/org/name/file.json")
    if files and HUB_ID.fullmatch(path):
        return download(path, path, files, None)
    return None


def download(path: str, name: str, files: Sequence[str], revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from data.recipes.rows import asking_hub

    with asking_hub(path):
        for file in files:
            try:
                return Path(hf_hub_download(name, file, repo_type="dataset", revision=revision))
            except EntryNotFoundError as error:
                # A subclass of the error above: no network, and the file is not cached.
                if isinstance(error, LocalEntryNotFoundError):
                    raise
    raise ValueError(f"path={path}: none of {', '.join(files)} there; name a file as path=hf://datasets/{name}/<file>")
