"""Which of Prefect's lines about runs a terminal shows."""

import logging
from collections.abc import Iterator

import pytest

from flows.log_filter import quieten_runs

LOGGER = logging.getLogger("prefect.task_runs")


@pytest.fixture(autouse=True)
def _unfiltered() -> Iterator[None]:
    """The filters go with the test."""
    loggers = [logging.getLogger(name) for name in ("prefect.task_runs", "prefect.flow_runs")]
    before = [list(logger.filters) for logger in loggers]
    for logger in loggers:
        logger.filters = []
    yield
    for logger, filters in zip(loggers, before, strict=True):
        logger.filters = filters


def record_of(text: str, error: BaseException | None = None) -> logging.LogRecord:
    exc_info = (type(error), error, None) if error else None
    return logging.LogRecord(LOGGER.name, logging.ERROR, __file__, 1, text, (), exc_info)


@pytest.mark.parametrize(
    ("error", "has_trace"),
    [
        (ValueError("no such target"), False),
        (ConnectionError("no Hub"), False),
        (KeyError("a mistake of ours"), True),
        (AssertionError("a mistake of ours"), True),
    ],
)
def test_the_traceback_of_a_bug_is_shown_and_that_of_a_mistake_is_not(error: Exception, has_trace: bool) -> None:
    quieten_runs(has_pages=True)
    record = record_of("Task run failed with exception", error)
    assert LOGGER.filter(record)
    assert bool(record.exc_info) == has_trace


def test_what_a_task_failed_of_is_told_once() -> None:
    quieten_runs(has_pages=True)
    assert LOGGER.filter(record_of("Task run failed with exception: ValueError('no such target')"))
    assert not LOGGER.filter(
        record_of("Finished in state Failed('Task run encountered an exception ValueError: no such target')")
    )
    assert LOGGER.filter(record_of("Finished in state Failed('1 of 1 entries did not pass: tiny')"))


def test_pages_are_named_where_a_server_has_some() -> None:
    view = "View at http://127.0.0.1:4200/runs/1"
    quieten_runs(has_pages=True)
    assert LOGGER.filter(record_of(view))
    quieten_runs(has_pages=False)
    assert not LOGGER.filter(record_of(view))
