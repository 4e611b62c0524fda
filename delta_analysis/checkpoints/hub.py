"""Checkpoints on the Hugging Face hub: the weight, index and config files of a repository, and nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from glob import escape
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, errors, get_cached_repo_tree, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.folders import read_index

CONFIGS = ("config.json", "adapter_config.json")
# The first that a repository has is fetched, or its shards: an adapter before its merge, safetensors before pickles.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin")
TOKENIZER = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|generation_config)\.json"
    r"|vocab\.(json|txt|bpe)|merges\.txt|chat_template\.(json|jinja)|additional_chat_templates/[^/]+\.jinja"
    r"|[^/]+\.(model|tiktoken)|tekken\.json"
    r"|(processor|preprocessor|video_preprocessor|image_processor|feature_extractor)(_config)?\.json"
)
"""Files that belong to a model beside its weights: tokenizer, processor, and how it is prompted."""
NO_TOKENIZER = re.compile(r"generation_config\.json|.*processor.*\.json|feature_extractor.*|.*chat_template.*")
"""Those of them that make no tokenizer."""
# What git allows in the name of a branch or tag.
REVISION = re.compile(r"(?!/)(?!.*(\.\.|//))[^\s\x00-\x1f\x7f~^:?*\[\\]+(?<!/)")


class HubId(NamedTuple):
    """A repository on the hub and a branch, tag or commit of it (None: its main branch)."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse_hub_id(source: str) -> HubId | None:
    """What `org/name` or `org/name@revision` names, None if it cannot be a repository on the hub.

    A relative path such as `runs/last` has the same form: look for it on the disk first.
    """
    repo, at, revision = source.partition("@")
    if "/" not in repo or (at and not REVISION.fullmatch(revision)):
        return None
    try:
        validate_repo_id(repo)
    except errors.HFValidationError:
        return None
    return HubId(repo, revision or None)


def fetch_weights(hub: HubId) -> Path:
    """The local snapshot of a repository, with its weights, their index and its configuration.

    Weights are the first of `adapter_model.safetensors`, `adapter_model.bin`, `model.safetensors` and
    `pytorch_model.bin` that stands in the top folder, whole or as shards with an index. The snapshot's
    name is its commit. What the cache has is not fetched again; a complete snapshot needs no network.
    """
    folder, files = _listing(hub)
    pinned = hub._replace(revision=folder.name)
    weights = next((name for name in WEIGHTS if not files.isdisjoint((name, f"{name}.index.json"))), None)
    if weights is None:
        held = Counter(Path(name).suffix or name for name in sorted(files)).most_common(8)
        raise CheckpointError(
            f"{hub}: no weights of a known layout in the repository or its snapshot {folder}; expected "
            f"{', '.join(WEIGHTS)} or shards with an index, got {', '.join(f'{n} {kind}' for kind, n in held)}: "
            "give the repository that these were made from, or convert them with save_pretrained"
        )
    index = f"{weights}.index.json"
    if weights in files:
        return _snapshot(pinned, [weights])
    shards = read_index(_snapshot(pinned, [index]) / index)
    lost = [name for name in shards if name not in files or not name.endswith(Path(weights).suffix)]
    if lost:
        raise CheckpointError(
            f"{hub}: {index} names {lost[0]!r}, which is no weight file of the repository or its snapshot {folder} "
            f"({len(lost)} such): fetch it with the network on, or give another revision"
        )
    return _snapshot(pinned, shards)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer, or the vocabulary of one."""
    names = [file.name for file in folder.iterdir()]
    return any(TOKENIZER.fullmatch(name) and not NO_TOKENIZER.fullmatch(name) for name in names)


def fetch_tokenizer(hub: HubId) -> Path:
    """The local snapshot of a repository, with the files of its tokenizer, for evaluation.

    Give it `hub._replace(revision=fetch_weights(hub).name)` for the commit that the weights are of.
    Python files are never fetched, so a tokenizer that is code cannot run.
    """
    folder, files = _listing(hub)
    names = [name for name in sorted(files) if TOKENIZER.fullmatch(name)]
    if names in ([], ["generation_config.json"]):
        raise CheckpointError(f"{hub}: no tokenizer in the repository or its snapshot {folder}: use that of its base")
    return _snapshot(hub._replace(revision=folder.name), names)


def _listing(hub: HubId) -> tuple[Path, set[str]]:
    """The snapshot with the configuration in it, and what its repository holds at that commit."""
    folder = _snapshot(hub, CONFIGS)
    try:
        return folder, {entry.path for entry in get_cached_repo_tree(hub.repo, revision=folder.name)}
    except errors.CachedRepoTreeNotFoundError:  # a cache that another client filled, and no network
        return folder, {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _snapshot(hub: HubId, names: Collection[str]) -> Path:
    """The snapshot with those of the named files in it that the repository has."""
    try:
        # Patterns match across folders, so each is the name of one file.
        return Path(snapshot_download(hub.repo, revision=hub.revision, allow_patterns=[escape(name) for name in names]))
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
        raise CheckpointError(f"{hub}: {_cause(error, hub, names)}") from error


def _cause(error: Exception, hub: HubId, names: Collection[str]) -> str:
    """What went wrong, and what to do."""
    page = f"{constants.ENDPOINT}/{hub.repo}"
    match error:
        case errors.GatedRepoError():
            return (
                f"a gated repository: accept its licence on {page} and log in with `hf auth login` or HF_TOKEN, "
                "or give an ungated mirror of the same weights"
            )
        case errors.RepositoryNotFoundError():
            return (
                f"no such repository on {constants.ENDPOINT}: check its spelling (a local folder: its path); "
                "a private one needs `hf auth login` or HF_TOKEN"
            )
        case errors.RevisionNotFoundError():
            return f"no such branch, tag or commit: choose one that {page} has"
        case errors.LocalEntryNotFoundError():
            cached = {name: try_to_load_from_cache(hub.repo, name, revision=hub.revision) for name in names}
            lost = next(name for name, path in cached.items() if not isinstance(path, str))
            return (
                f"{lost} is not in the cache {constants.HF_HUB_CACHE}, and the hub does not give it "
                f"({error.__cause__ or error}): switch the network on and HF_HUB_OFFLINE off, or give a local folder"
            )
    return f"the hub refused or broke off ({error}): check HF_TOKEN and try again"
