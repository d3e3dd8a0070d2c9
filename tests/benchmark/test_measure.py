from collections.abc import Callable, Sequence

import pytest

from specforge_core.benchmark.measure import (
    WARM_UP_TOKENS,
    AnswerKey,
    Decode,
    Rounds,
    Run,
    Workload,
    deal,
    summarise,
    timed_runs,
)
from specforge_core.decoding.speculative import Generation
from specforge_core.digests import digest
from specforge_core.facts import Answers, PromptSums
from specforge_core.manifest_sections import ServingConfig
from specforge_core.targets import Completion, GenerationRequest, Sampling
from tests import tiny


def requests(count: int) -> list[GenerationRequest]:
    return [GenerationRequest(str(i), [10 + i, 20, 30]) for i in range(count)]


def dealt(count: int, **kwargs: int) -> list[str]:
    return ["".join(request.id for request in part) for part in deal(requests(count), **kwargs)]


def test_prompts_are_dealt_once_over_the_repeats():
    assert dealt(6, num_parts=3, min_size=1) == ["01", "23", "45"]
    assert dealt(5, num_parts=3, min_size=1) == ["0", "12", "34"]


def test_prompts_are_gone_through_again_where_there_are_too_few():
    assert dealt(4, num_parts=2, min_size=3) == ["012", "301"]
    assert dealt(3, num_parts=4, min_size=1) == ["0", "1", "2", "0"]
    assert dealt(2, num_parts=3, min_size=8) == ["01", "01", "01"]


def test_sides_warm_up_at_their_concurrency_and_take_turns_at_beginning():
    seen: list[tuple[str, int, str]] = []

    def noting(name: str) -> Decode:
        def decode(workload: Workload, requests: Sequence[GenerationRequest], advance: Callable[[], object]) -> Run:
            seen.append((name, workload.sampling.max_new_tokens, "".join(request.id for request in requests)))
            return Run({}, float(len(seen)))

        return decode

    workload = Workload("suite", requests(9), Sampling(50), ServingConfig(concurrency=2), repeats=3)
    without_draft, with_draft = timed_runs(workload, [noting("base"), noting("draft")])
    assert seen == [
        ("base", WARM_UP_TOKENS, "01"),
        ("draft", WARM_UP_TOKENS, "01"),
        ("base", 50, "012"),
        ("draft", 50, "012"),
        ("draft", 50, "345"),
        ("base", 50, "345"),
        ("base", 50, "678"),
        ("draft", 50, "678"),
    ]
    assert [run.elapsed_s for run in without_draft] == [3, 6, 7]
    assert [run.elapsed_s for run in with_draft] == [4, 5, 8]


def answered(texts: dict[str, str], num_verify_steps: int, elapsed_s: float) -> Run:
    tokenizer = tiny.make_tokenizer()
    generations = {
        id: Generation(Completion(id, tuple(tokenizer(text)["input_ids"]), "stop"), num_verify_steps, (2, 1), 1.0)
        for id, text in texts.items()
    }
    return Run(generations, elapsed_s)


def test_figures_follow_from_the_rounds_as_counted_by_hand():
    # Every character is a token.
    baseline = [answered({"a": "#### 4", "b": "#### 5"}, 5, 6.0), answered({"a": "#### 6"}, 5, 3.0)]
    speculative = [answered({"b": "#### 9", "a": "#### 4"}, 3, 3.0), answered({"a": "#### 6"}, 3, 1.0)]
    key = AnswerKey("number", {"a": "4", "b": "5", "never asked": "6"})
    workload = Workload("suite", requests(2), Sampling(50), ServingConfig(num_steps=2, num_draft_tokens=3), 2, key)
    figures = summarise(workload, Rounds(baseline, speculative), tiny.make_tokenizer())
    # The second answer to "a" counts for speed alone.
    assert (figures.num_prompts, figures.num_output_tokens, figures.num_verify_steps) == (2, 12, 6)
    assert (figures.accepted_by_position, figures.acceptance_length) == ((4, 2), 2.0)
    # By prompt, whichever was answered first.
    assert figures.prompts == PromptSums(
        ids_digest=digest(["a", "b"]), num_output_tokens=(6, 6), num_verify_steps=(3, 3)
    )
    assert (figures.acceptance_length_low, figures.acceptance_length_high) == (2.0, 2.0)
    assert figures.baseline_output_tokens_per_s == (2.0, 2.0)
    assert figures.output_tokens_per_s == (4.0, 6.0)
    assert figures.speedup == 2.5
    assert figures.answers == Answers(num_checked=2, num_correct=1, num_correct_without_draft=2)


def test_answers_of_one_token_are_refused():
    runs = [answered({"a": "4"}, 0, 1.0)] * 2
    workload = Workload("suite", requests(1), Sampling(50), ServingConfig(), 2)
    with pytest.raises(ValueError, match="suite: every answer is a single token"):
        summarise(workload, Rounds(runs, runs), tiny.make_tokenizer())
