"""Where the project's own data lie, and how files are written: whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from delta_analysis._errors import CheckpointError


def find_root() -> Path:
    """The repository: the nearest folder above the package or the working directory with data/zoo."""
    for start in (Path(__file__).resolve(), Path.cwd().resolve()):
        for folder in (start, *start.parents):
            if (folder / "data" / "zoo").is_dir():
                return folder
    raise FileNotFoundError(
        "data/zoo was not found above the package or the working directory; "
        "install with `make install` from a clone of the repository"
    )


def resolve(path: str | Path) -> Path:
    """A path to write: as given if absolute, else relative to the repository, wherever the kernel runs."""
    given = Path(path).expanduser()
    return given if given.is_absolute() else find_root() / given


def find_input(path: str | Path) -> Path:
    """A path to read: from the working directory if it is there, else relative to the repository."""
    given = Path(path).expanduser()
    if not given.exists():
        return resolve(given)
    # A file keeps its own name: in the hub's cache it is a link to one without a suffix.
    return given.resolve() if given.is_dir() else given.parent.resolve() / given.name


def writable_folder(path: str | Path) -> Path:
    """The folder, made if it is absent; an OSError now, before any work, if nothing can be written there."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        return folder


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that gets the name `path` when all is written; if it fails, nothing is left.

    Any number may write the same one at the same time: the last to end stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def zoo_names() -> list[str]:
    """The embedded models, as `small/base`."""
    zoo = find_root() / "data" / "zoo"
    return sorted(str(config.parent.relative_to(zoo)) for config in zoo.glob("*/[!.]*/config.json"))


def zoo_model(source: str) -> Path:
    """Directory of the embedded model that `zoo:<size>/<name>` names."""
    name = source.removeprefix("zoo:")
    known = zoo_names()
    if name not in known:
        raise CheckpointError(
            f"{source}: no such embedded model; known are {', '.join(f'zoo:{each}' for each in known)}"
        )
    return find_root() / "data" / "zoo" / name
