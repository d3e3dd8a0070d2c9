from collections import Counter
from random import Random

import pytest
import torch
from scipy.stats import chisquare

from specforge_core.decoding.verification import (
    Verdict,
    greedy_verdicts,
    sampled_verdicts,
    target_probabilities,
)

# From token a (row) the target writes token b (column) with this probability.
CHAIN = torch.tensor(
    [
        [0.50, 0.30, 0.15, 0.05],
        [0.05, 0.05, 0.10, 0.80],
        [0.25, 0.25, 0.25, 0.25],
        [0.00, 0.60, 0.40, 0.00],
    ]
)
NUM_TRIALS = 20_000
# A right rule is below it once in a thousand seeds, and the seeds are fixed; the wrong rules are below 1e-100.
SIGNIFICANCE = 1e-3


def verdicts_of(proposed: list[int], first: int = 0) -> list[Verdict]:
    """What many independent rows keep of one chain that follows token `first`."""
    probabilities_TV = CHAIN[[first, *proposed]]
    randoms = [Random(f"{proposed} {i}") for i in range(NUM_TRIALS)]
    return sampled_verdicts(probabilities_TV.expand(NUM_TRIALS, -1, -1), [proposed] * NUM_TRIALS, randoms)


def p_value(observed: Counter[int], probabilities_V: torch.Tensor) -> float:
    assert all(probabilities_V[token] > 0 for token in observed), "a token that the target never writes"
    possible = [token for token in range(len(probabilities_V)) if probabilities_V[token] > 0]
    total = sum(observed.values())
    weights = probabilities_V[possible].double()
    return chisquare([observed[token] for token in possible], (weights / weights.sum() * total).numpy()).pvalue


def kept_tokens(verdict: Verdict, proposed: list[int]) -> list[int]:
    return [*proposed[: verdict.num_accepted], verdict.next_token]


@pytest.mark.parametrize("proposed", [[0, 0], [1, 3], [3, 1], [2, 2]])
def test_rejection_sampling_leaves_the_targets_distribution_unchanged(proposed):
    kept = [kept_tokens(verdict, proposed) for verdict in verdicts_of(proposed)]
    assert p_value(Counter(tokens[0] for tokens in kept), CHAIN[0]) > SIGNIFICANCE
    # Where a second token was written, it follows the first one's distribution.
    second = Counter(tokens[1] for tokens in kept if len(tokens) > 1)
    assert p_value(second, CHAIN[proposed[0]]) > SIGNIFICANCE
    third = Counter(tokens[2] for tokens in kept if len(tokens) > 2)
    assert p_value(third, CHAIN[proposed[1]]) > SIGNIFICANCE


def test_a_rule_that_redraws_from_the_whole_distribution_fails_the_same_test():
    random = Random(0)
    accepted = [random.random() < CHAIN[0, 0] for _ in range(NUM_TRIALS)]
    wrong = Counter(0 if is_accepted else random.choices(range(4), CHAIN[0].tolist())[0] for is_accepted in accepted)
    assert p_value(wrong, CHAIN[0]) < 1e-100


def test_a_rule_that_always_accepts_fails_the_same_test():
    assert p_value(Counter({0: NUM_TRIALS - 1, 1: 1}), CHAIN[0]) < 1e-100


def test_a_token_that_the_target_never_writes_is_never_accepted():
    assert all(verdict.num_accepted == 0 for verdict in verdicts_of([0, 0], first=3))


def test_without_proposals_sampling_draws_from_the_target():
    assert p_value(Counter(verdict.next_token for verdict in verdicts_of([])), CHAIN[0]) > SIGNIFICANCE


def test_a_rows_result_does_not_depend_on_the_rows_beside_it():
    probabilities_BTV = CHAIN[torch.tensor([[0, 1, 3], [2, 2, 2], [1, 3, 1]])]
    proposed = [[1, 3], [2, 2], [3, 1]]

    def randoms() -> list[Random]:
        return [Random(str(row)) for row in range(3)]

    together = sampled_verdicts(probabilities_BTV, proposed, randoms())
    alone = [
        sampled_verdicts(probabilities_BTV[row : row + 1], proposed[row : row + 1], randoms()[row : row + 1])[0]
        for row in range(3)
    ]
    assert together == alone


def test_greedy_verification_keeps_the_common_prefix_and_the_targets_next_token():
    logits_BTV = torch.nn.functional.one_hot(torch.tensor([[4, 2, 7], [4, 2, 7], [4, 2, 7]]), 9).float()
    verdicts = greedy_verdicts(logits_BTV, [[4, 2], [4, 7], [2, 2]])
    assert verdicts == [Verdict(2, 7), Verdict(1, 2), Verdict(0, 4)]


def test_temperature_and_top_p_give_the_distribution_worked_by_hand():
    logits_V = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[None, None]
    plain = target_probabilities(logits_V, temperature=1.0, top_p=1.0)[0, 0]
    torch.testing.assert_close(plain, torch.tensor([0.4, 0.3, 0.2, 0.1]))
    # 0.4 + 0.3 reaches 0.7, so the third token is cut: 4/7 and 3/7 remain.
    nucleus = target_probabilities(logits_V, temperature=1.0, top_p=0.65)[0, 0]
    torch.testing.assert_close(nucleus, torch.tensor([4 / 7, 3 / 7, 0.0, 0.0]))
    # Temperature 1/2 squares the odds: 16 : 9 : 4 : 1.
    cold = target_probabilities(logits_V, temperature=0.5, top_p=1.0)[0, 0]
    torch.testing.assert_close(cold, torch.tensor([16.0, 9.0, 4.0, 1.0]) / 30)
    # However small top_p is, the favourite stays.
    assert target_probabilities(logits_V, temperature=1.0, top_p=1e-9)[0, 0].tolist() == [1.0, 0.0, 0.0, 0.0]
