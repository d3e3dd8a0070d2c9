"""The sqlite database that MLflow keeps in a store: there whole, or not at all.

MLflow makes one in a second of some hundred statements, and where a kill, or a second MLflow at the same time, left a
part of the tables it never opens the file again. So it is made in a folder beside, by one process at a time, and then
moved to its place.
"""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from mlflow.exceptions import MlflowException


@contextlib.contextmanager
def database_at(uri: str) -> Iterator[None]:
    """Around the opening of the database file at `uri`, which is made before if need be.

    Raises: ValueError if it cannot be opened.
    """
    # Here as below: a build that is tracked by a server does without this second of imports.
    from sqlalchemy import make_url
    from sqlalchemy.exc import DBAPIError

    path = Path(make_url(uri).database or "")
    if not path.exists():
        _make(path)
    try:
        yield
    except DBAPIError as error:
        raise ValueError(
            f"MLflow cannot open {path} ({error.orig}); move it away and build again: drafts, reports and what is "
            "published stay, the history of runs and champions begins anew"
        ) from error
    except MlflowException as error:
        # Another version of MLflow made it; the error says what to do.
        raise ValueError(f"MLflow cannot open {path}: {error}") from error


def _make(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        # The kernel lets go of it when its holder dies.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        beside = path.with_name(f".{path.name}.new")
        # What a kill left there.
        shutil.rmtree(beside, ignore_errors=True)
        made = SqlAlchemyStore(f"sqlite:///{beside / path.name}", default_artifact_root=str(path.parent / "mlflow"))
        made.engine.dispose()
        # Of a database that was moved away: SQLite would put its pages into the new one.
        path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
        (beside / path.name).replace(path)
        beside.rmdir()
