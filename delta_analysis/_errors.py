"""The package's own errors; all of them are `ValueError`s."""

from __future__ import annotations

from collections.abc import Iterable


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: says which file and tensor, and what to do."""


class NotHomologousError(ValueError):
    """Two checkpoints that do not share an architecture, so that their difference means nothing."""


def one_of(what: str, value: object, allowed: Iterable[object]) -> str:
    """Message for a value outside a known set."""
    return f"{what} must be one of {', '.join(map(repr, allowed))}; not {value!r}"
