"""What of Prefect's lines about runs a terminal shows: each failure once."""

import logging

from tasks.stage import StageError

TOLD = StageError | InterruptedError | ValueError | ConnectionError
"""A stage has printed its own traceback, and of what a user got wrong the sentence is enough; Prefect's, through three
layers of engine, would bury either."""
REPEATED = "Finished in state Failed('Task run encountered an exception"
"""The line before it has the exception, too."""


def quieten_runs(*, has_pages: bool) -> None:
    """Filter the lines about runs, in this process. Args: has_pages: whether the server shows runs to a browser."""

    def tidy(record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], TOLD):
            record.exc_info = None
        text = record.getMessage()
        return not text.startswith(REPEATED) and (has_pages or not text.startswith("View at"))

    for logger in ("prefect.task_runs", "prefect.flow_runs"):
        logging.getLogger(logger).addFilter(tidy)
