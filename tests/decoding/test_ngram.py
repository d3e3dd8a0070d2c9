import pytest

from specforge_core.decoding.drafters import Extension
from specforge_core.decoding.ngram import NgramDrafter, SupervisedTokens, learn_continuations
from specforge_core.decoding.speculative import generate
from specforge_core.targets import Sampling


def test_the_table_holds_the_most_frequent_supervised_continuation():
    documents = [
        SupervisedTokens([1, 2, 3, 4], [False, False, True, True]),
        SupervisedTokens([1, 2, 5], [False, False, True]),
        SupervisedTokens([9, 2, 5], [False, False, True]),
        SupervisedTokens([1, 2, 7, 7], [False, False, False, False]),
    ]
    # After 2 came 3 once and 5 twice; after (1, 2) both came once, and the lower id is taken; 7 is never supervised.
    assert learn_continuations(documents) == {
        (2,): 5,
        (1, 2): 3,
        (9, 2): 5,
        (3,): 4,
        (2, 3): 4,
        (1, 2, 3): 4,
    }


def test_the_longest_context_wins_and_the_rows_own_text_comes_first():
    drafter = NgramDrafter({(1, 2, 3): 50, (2, 3): 51, (3,): 52, (8,): 53})
    drafter.begin(num_rows=1)
    drafter.extend(0, [Extension(0, [2, 3, 6, 3, 7, 3])], None)
    # Own text: (2, 3) -> 6, and (3,) -> 7, the newest. The table knows (1, 2, 3).
    assert drafter.propose([[1, 2, 3]], 1) == [[50]]
    assert drafter.propose([[0, 2, 3]], 1) == [[6]]
    assert drafter.propose([[0, 0, 3]], 1) == [[7]]
    assert drafter.propose([[0, 0, 8]], 2) == [[53, 53]]


def test_a_new_request_in_a_row_forgets_the_one_before():
    drafter = NgramDrafter({})
    drafter.begin(num_rows=1)
    drafter.extend(0, [Extension(0, [1, 2])], None)
    assert drafter.propose([[1]], 1) == [[2]]
    drafter.extend(0, [Extension(0, [1, 3])], None)
    assert drafter.propose([[1]], 1) == [[3]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_ngrams_that_saw_the_answers_are_accepted_and_change_none(target, references, batch_size):
    requests = [reference.request for reference in references]
    seen = [SupervisedTokens(reference.full, [True] * len(reference.full)) for reference in references]
    drafter = NgramDrafter(learn_continuations(seen))
    generations = list(generate(target, requests, Sampling(41), batch_size=batch_size, drafter=drafter))
    expected = {reference.request.id: tuple(reference.answer) for reference in references}
    assert {g.completion.id: g.completion.token_ids for g in generations} == expected
    # Three tokens of context tell these random texts apart, so nearly every step keeps its whole chain.
    assert sum(len(g.completion.token_ids) for g in generations) > 3 * sum(g.num_verify_steps for g in generations)
