"""A pickle that shows that it was read."""

import pickle
from pathlib import Path


class PickleBomb:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def plant(path: Path, mark: Path) -> None:
    """Write one to `path` that leaves `mark`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(PickleBomb(mark)))
