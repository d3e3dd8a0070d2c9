"""A stage's progress bar on the page of its run: Prefect's progress artifacts, read off the lines that it prints."""

import contextvars
import logging
import re
from collections.abc import Callable
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.exceptions import PrefectHTTPStatusError

logger = logging.getLogger(__name__)

# As tqdm prints it: "train:  45%|####5     | 120/266 [00:12<00:15, 9.73 step/s]".
BAR = re.compile(r"^(?P<what>[^|]+?):\s+(?P<percent>\d{1,3})%\|")


def artifact_key(name: str) -> str:
    """A name as Prefect allows it for artifacts: lower-case letters, digits and dashes."""
    return name.replace(".", "-")


def progress_reader(name: str) -> Callable[[str], None]:
    """A function for each line of a stage's output, on whatever thread; outside a task run it does nothing.

    Args: name: of the artifact; each bar that the stage prints becomes a new version of it.
    """
    if TaskRunContext.get() is None:
        return lambda line: None
    # An artifact belongs to the run that made it, which a thread finds in its context.
    context = contextvars.copy_context()
    shown: dict[str, UUID] = {}

    def show(what: str, percent: float) -> None:
        if what in shown:
            update_progress_artifact(shown[what], percent)
            return
        created = create_progress_artifact(percent, key=artifact_key(name), description=what)
        assert isinstance(created, UUID)
        shown[what] = created

    def read(line: str) -> None:
        bar = BAR.match(line)
        if bar is None:
            return
        try:
            context.run(show, bar["what"], float(bar["percent"]))
        except PrefectHTTPStatusError as error:
            # A busy server is no reason to lose lines of the log.
            logger.warning("progress of %s is not shown: %s", name, error)

    return read
