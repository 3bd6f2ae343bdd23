"""One file of golden figures, which notices missing entries and entries that nothing reads."""

import json
from pathlib import Path

import numpy as np


class GoldenError(AssertionError):
    """A file of golden figures is not in the format; the message is one line that says why."""


class GoldenFile:
    """The entries of an npz or JSON file, by name.

    Attributes:
      path: of the file; its folder may hold others that belong to it.
      seed: what the figures were drawn with, where the caller knows; `None` otherwise.
      unread: names of the entries that nothing has read yet.
    """

    def __init__(self, path: Path, seed: int | None = None):
        if not path.is_file():
            raise GoldenError(f"{path.name} is missing in {path.parent}")
        try:
            if path.suffix == ".json":
                self._entries = json.loads(path.read_text())
            else:
                with np.load(path) as archive:
                    self._entries = dict(archive)
        except Exception as error:
            raise GoldenError(f"{path.name} cannot be read: {error}") from error
        self.path, self.seed = path, seed
        self.unread = set(self._entries)

    def __contains__(self, name):
        return name in self._entries

    def __iter__(self):
        return iter(self._entries)

    def __getitem__(self, name):
        if name not in self._entries:
            raise GoldenError(f"{self.path.name} has no {name}")
        self.unread.discard(name)
        return self._entries[name]

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """The entries whose names start with `prefix/`, named by what follows."""
        names = [name for name in self if name.startswith(f"{prefix}/")]
        if not names:
            raise GoldenError(f"{self.path.name} has nothing under {prefix}/")
        return {name.removeprefix(f"{prefix}/"): self[name] for name in names}

    def leave(self, *names: str) -> None:
        """Accounts for entries that the format has and no comparison needs."""
        for name in names:
            self[name]
