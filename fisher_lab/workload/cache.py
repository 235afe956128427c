"""The cache of tokenizers and checkpoints, and the hashes that name and verify them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import platformdirs

VARIABLE = "FISHER_LAB_CACHE"


def directory(cache_dir: str | None) -> Path:
    """The cache: ``cache_dir`` if given, else ``$FISHER_LAB_CACHE``, else the user's cache."""
    chosen = cache_dir or os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser().resolve()
    return Path(platformdirs.user_cache_dir("fisher_lab"))


def key_of(content: dict[str, Any]) -> str:
    """A hash of ``content`` (JSON-able) with 16 hexadecimal digits, as a stable name."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]


def sha256_of(*files: Path) -> str:
    """Hash of the files' names and contents."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
