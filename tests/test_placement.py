"""Which GPUs serve and which train."""

import pytest

from specforge_core.placement import propose_split


@pytest.mark.parametrize(
    ("num_gpus", "produce", "train", "serve_gpus", "tokens_per_s"),
    [
        (2, 60_000, 45_000, 1, 45_000),
        (2, 10_000, 45_000, 1, 10_000),
        # 3 x 60,000 against 5 x 45,000 is 180,000; 4 against 4 is 180,000 as well, 2 against 6 is 120,000.
        (8, 60_000, 45_000, 3, 180_000),
        # 6 x 10,000 against 2 x 45,000, one more would leave 45,000 of 70,000.
        (8, 10_000, 45_000, 6, 60_000),
        (8, 900_000, 45_000, 1, 315_000),
    ],
)
def test_the_slower_side_is_as_fast_as_can_be(
    num_gpus: int, produce: float, train: float, serve_gpus: int, tokens_per_s: float
) -> None:
    placement = propose_split(num_gpus, produce, train)
    assert (placement.serve_gpus, placement.train_gpus) == (serve_gpus, num_gpus - serve_gpus)
    assert placement.tokens_per_s == tokens_per_s


def test_servers_and_replicas_take_their_gpus_together() -> None:
    # Of 8 GPUs, servers of 4 leave 4 to train; two servers would leave none.
    placement = propose_split(8, 1_000, 45_000, gpus_per_server=4)
    assert (placement.serve_gpus, placement.train_gpus) == (4, 4)
    # 2 that serve leave room for one replica of 4: two GPUs stay out of it.
    placement = propose_split(8, 900_000, 1_000, gpus_per_server=2, gpus_per_replica=4)
    assert (placement.serve_gpus, placement.train_gpus, placement.tokens_per_s) == (2, 4, 4_000)


def test_what_waits_is_idle() -> None:
    # One GPU makes 60,000, one takes 45,000: the first waits a quarter of its time, half of the GPUs.
    assert propose_split(2, 60_000, 45_000).idle_share == pytest.approx(0.125)
    assert propose_split(2, 45_000, 45_000).idle_share == 0


@pytest.mark.parametrize(("num_gpus", "gpus_per_server"), [(1, 1), (2, 2)])
def test_too_few_gpus_for_both_are_refused(num_gpus: int, gpus_per_server: int) -> None:
    with pytest.raises(ValueError, match=f"{num_gpus} GPUs are too few for a server of {gpus_per_server}"):
        propose_split(num_gpus, 1.0, 1.0, gpus_per_server=gpus_per_server)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rates of 0.0 and 45000.0 tokens/s should be positive"):
        propose_split(2, 0.0, 45_000.0)
