"""Where results come from: hashes of the files that were read, versions of what read them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from delta_analysis.checkpoints.checkpoint import open_checkpoint, tokenizer_folder
from delta_analysis.checkpoints.hub import CONFIGS, TOKENIZER
from delta_analysis.checkpoints.paths import sha256

PACKAGES = ("delta_analysis", "torch", "transformers", "tokenizers", "numpy", "pandas", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{each: importlib.metadata.version(each) for each in PACKAGES}}


def file_hashes(source: str) -> dict[str, str]:
    """SHA-256 of each weight file of a checkpoint; of one from the hub, the hash that its cache files it under."""
    return _hashes(open_checkpoint(source).files())


def content_hash(source: str) -> str:
    """One hash of all that a checkpoint's model and tokenizer are made of, whatever folder they lie in.

    Examples
    --------
    >>> len(content_hash("zoo:small/base"))
    32
    """
    checkpoint = open_checkpoint(source)
    folders = {folder for folder in (checkpoint.path, tokenizer_folder(checkpoint)) if folder and folder.is_dir()}
    beside = {
        file
        for folder in folders
        for file in folder.iterdir()
        if file.name in CONFIGS or TOKENIZER.fullmatch(file.name)
    }
    listed = json.dumps(_hashes(sorted({*checkpoint.files(), *beside})), sort_keys=True)
    return hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()


def _hashes(files: list[Path]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda path: _cached_hash(path) or _file_hash(path), files)
        # Shards in folders of their own may have one name.
        count = Counter(path.name for path in files)
        names = [path.name if count[path.name] == 1 else f"{path.parent.name}/{path.name}" for path in files]
        return dict(zip(names, hashes, strict=True))


def _cached_hash(path: Path) -> str:
    filed = path.resolve().name if path.is_symlink() else ""
    return filed if re.fullmatch(r"[0-9a-f]{64}", filed) else ""


def _file_hash(path: Path) -> str:
    """SHA-256 of a file, read again only if it has changed."""
    stat = path.stat()
    return _hash_of(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash_of(path: Path, _size: int, _changed: int) -> str:
    return sha256(path)
