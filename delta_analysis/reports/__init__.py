"""Parameters, claims, sentences and pages of the notebooks."""

__all__ = []
