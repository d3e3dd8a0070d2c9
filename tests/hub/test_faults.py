"""Whatever goes wrong while a version is published, a whole one is left, and publishing again completes the new one."""

from pathlib import Path

import pytest

from tests.hub_like.faults import CASES, Case, run_case

# A process to kill takes a while to start, silence lasts, and the client itself tries some requests for half a minute.
SLOW = [case for case in CASES if case.kills or not case.delays_s or (case.lasts and "timeout" in case.name)]


def params() -> list[object]:
    return [
        pytest.param(
            case,
            id=f"{case.name}{', every time' if case.lasts else ''}",
            marks=[pytest.mark.slow] if case in SLOW else [],
        )
        for case in CASES
    ]


@pytest.mark.parametrize("case", params())
def test_a_fault_leaves_the_old_or_the_new_version_whole(tmp_path: Path, case: Case) -> None:
    run_case(case, tmp_path)
