"""A person's home folder."""

from __future__ import annotations

from pathlib import Path


def home() -> Path | None:
    """None where there is none: HOME is not set, and the system does not know the user, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None
