"""Which draft a rollback makes the champion, and what builds may publish after it, on a real MLflow over sqlite."""

import pytest

from tasks.registry import begin_rollback, plan_rollback, register
from tests.tasks.made_drafts import TOO_SLOW, Factory


def test_a_rollback_goes_to_the_champion_before_and_twice_to_the_one_before_that(factory: Factory) -> None:
    for draft in ("d1", "d2", "d3"):
        factory.publish(draft)
    assert factory.roll_back() == 2
    assert factory.roll_back() == 1
    assert factory.statuses() == ["published", "rolled-back", "rolled-back"]
    with pytest.raises(ValueError, match="demo has nothing to go back to: 1 champion, 2 rolled-back, 3 rolled-back"):
        plan_rollback("demo", None, store=factory.store)
    # A new draft follows the one that is there now.
    factory.publish("d4")
    assert factory.roll_back() == 1


@pytest.mark.slow
def test_the_champion_before_is_the_one_that_was_promoted_before_whatever_its_number(factory: Factory) -> None:
    factory.publish("d1")
    factory.publish("d2")
    assert factory.publish("d1").number == 1
    assert factory.champion() == 1
    assert factory.roll_back() == 2


def test_no_build_publishes_again_what_was_rolled_back_but_a_person_may(factory: Factory) -> None:
    factory.publish("d1")
    factory.publish("d2")
    factory.roll_back()
    assert factory.standing("d2").rolled_back == 2
    assert factory.standing("d3").rolled_back is None
    # That build is rejected, and no version's status follows from it.
    build = factory.build()
    register(build, factory.report(build, "d2", failures=(TOO_SLOW,)))
    assert factory.statuses() == ["published", "rolled-back"]
    assert factory.roll_back(to=2) == 2
    assert factory.standing("d2").rolled_back is None
    assert factory.roll_back() == 1


@pytest.mark.slow
def test_a_rollback_over_several_undoes_all_that_were_promoted_since(factory: Factory) -> None:
    for draft in ("d1", "d2", "d3"):
        factory.publish(draft)
    assert factory.roll_back(to=1) == 1
    assert factory.statuses() == ["published", "rolled-back", "rolled-back"]
    assert factory.roll_back(to=2) == 2
    assert factory.statuses() == ["published", "published", "rolled-back"]


def test_a_rollback_that_was_cut_short_is_completed_by_the_next(factory: Factory) -> None:
    factory.publish("d1")
    factory.publish("d2")
    begin_rollback(plan_rollback("demo", None, store=factory.store), store=factory.store)
    # Users still get the second, and no build publishes it again.
    assert factory.champion() == 2
    assert factory.standing("d2").rolled_back == 2
    assert factory.roll_back() == 1


@pytest.mark.slow
def test_a_rollback_that_was_cut_short_can_be_called_off(factory: Factory) -> None:
    factory.publish("d1")
    factory.publish("d2")
    begin_rollback(plan_rollback("demo", None, store=factory.store), store=factory.store)
    assert factory.roll_back(to=2) == 2
    assert factory.statuses() == ["published", "published"]


def test_versions_that_cannot_be_gone_back_to_are_refused(factory: Factory) -> None:
    with pytest.raises(ValueError, match="demo has no champion in sqlite:"):
        plan_rollback("demo", None, store=factory.store)
    factory.publish("d1")
    build = factory.build()
    register(build, factory.report(build, "d2", failures=(TOO_SLOW,)))
    with pytest.raises(ValueError, match="version 1 of demo is the champion already"):
        plan_rollback("demo", 1, store=factory.store)
    for number in (2, 7):
        with pytest.raises(ValueError, match=f"no version {number} that was published: 1 champion, 2 rejected"):
            plan_rollback("demo", number, store=factory.store)
