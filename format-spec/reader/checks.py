"""What can be wrong with a repository, and how the reader says so (13)."""
from __future__ import annotations

from functools import partial
from typing import Any

class Unsupported(Exception):
    """The repository uses something that this reader does not know (exit code 3)."""

class Damaged(Exception):
    """Something in the repository does not match (exit code 4)."""

class Failure(Exception):
    """Neither: no key that fits, no such backup, a target that is not empty (exit code 1)."""

def require(condition: Any, text: str, error: type[Exception] = Damaged) -> None:
    """What does not match is damaged (13), unless the caller says otherwise."""
    if not condition:
        raise error(text)

supported, allowed = partial(require, error=Unsupported), partial(require, error=Failure)
