import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from specforge_core.decoding.ngram import NgramDrafter
from specforge_core.decoding.speculative import Generation, check_rewindable, generate
from specforge_core.targets import GenerationRequest, Sampling
from specforge_core.targets.hf import HFTarget
from tests.decoding.conftest import NUM_NEW_TOKENS, Reference
from tests.decoding.drafters import FunctionDrafter, knowing

SOME_TOKEN = 3
GREEDY = Sampling(max_new_tokens=NUM_NEW_TOKENS)


def run(target: HFTarget, requests: Sequence[GenerationRequest], sampling: Sampling = GREEDY, **kwargs: Any):
    """Generations by request id."""
    kwargs = {"batch_size": 1, **kwargs}
    return {generation.completion.id: generation for generation in generate(target, requests, sampling, **kwargs)}


def answers(generations: dict[str, Generation]) -> dict[str, list[int]]:
    return {id: list(generation.completion.token_ids) for id, generation in generations.items()}


def expected(references: Sequence[Reference]) -> dict[str, list[int]]:
    return {reference.request.id: reference.answer for reference in references}


def with_eos(target: HFTarget, token_id: int) -> HFTarget:
    """The same target with another end-of-turn token."""
    changed = copy.copy(target)
    changed.eos_token_ids = frozenset({token_id})
    return changed


# 2 rows for 5 requests: rows are filled again; 4: one row is left over at the end; 8: more rows than requests.
@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_greedy_decoding_is_what_transformers_generates(target, references, batch_size):
    requests = [reference.request for reference in references]
    assert answers(run(target, requests, batch_size=batch_size)) == expected(references)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_random_drafter_changes_no_greedy_answer(target, references, batch_size):
    generator = torch.Generator().manual_seed(1)
    # From 4 tokens that the answers use often, so that some are accepted and most are not.
    frequent = torch.tensor([token for reference in references for token in reference.answer]).bincount().topk(4)
    drafter = FunctionDrafter(
        lambda sequence, n: frequent.indices[torch.randint(0, 4, (n,), generator=generator)].tolist()
    )
    requests = [reference.request for reference in references]
    generations = run(target, requests, batch_size=batch_size, drafter=drafter)
    assert answers(generations) == expected(references)
    accepted = sum(sum(generation.accepted_by_position) for generation in generations.values())
    assert 0 < accepted < 100, "the test must see acceptance and rejection"


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("num_right", "num_verify_steps", "accepted_by_position"),
    [
        # 41 tokens: one from the prefill, then 1, 2 or 4 from each verification.
        (0, 40, (0, 0, 0)),
        (1, 20, (20, 0, 0)),
        (3, 10, (10, 10, 10)),
    ],
)
def test_a_drafter_of_known_quality_gives_the_steps_counted_by_hand(
    target, references, batch_size, num_right, num_verify_steps, accepted_by_position
):
    uncut = [reference for reference in references if len(reference.answer) == NUM_NEW_TOKENS]
    assert len(uncut) == 4, "one of the five ends by itself"
    drafter = knowing([reference.full for reference in uncut], num_right=num_right)
    requests = [reference.request for reference in uncut]
    generations = run(target, requests, batch_size=batch_size, drafter=drafter, num_steps=3)
    assert answers(generations) == expected(uncut)
    for generation in generations.values():
        assert generation.num_verify_steps == num_verify_steps
        assert generation.accepted_by_position == accepted_by_position
        assert generation.completion.finish_reason == "length"


def test_a_last_step_that_the_limit_cuts_counts_as_a_step_and_its_lost_tokens_do_not(target, references):
    drafter = knowing([references[1].full], num_right=3)
    generation = run(target, [references[1].request], Sampling(39), drafter=drafter)["request-1"]
    # 1 + 9 x 4 = 37, and the tenth step has room for two of its four tokens.
    assert list(generation.completion.token_ids) == references[1].answer[:39]
    assert generation.num_verify_steps == 10
    assert generation.accepted_by_position == (10, 10, 9)


@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_nothing_is_emitted_after_an_end_of_turn_token(target, references, num_right):
    reference = references[1]
    # At the prefill's token, and at every place of the first chains.
    for eos in set(reference.answer[:9]):
        end = reference.answer.index(eos)
        drafter = knowing([reference.full], num_right=num_right)
        generation = run(with_eos(target, eos), [reference.request], drafter=drafter)[reference.request.id]
        assert list(generation.completion.token_ids) == reference.answer[: end + 1]
        assert generation.completion.finish_reason == "stop"


def test_one_new_token_needs_the_prefill_only(target, references):
    generation = run(target, [references[0].request], Sampling(1), drafter=NgramDrafter({}))["request-0"]
    assert list(generation.completion.token_ids) == references[0].answer[:1]
    assert generation.num_verify_steps == 0


@pytest.mark.parametrize(("prompt_length", "num_new"), [(506, 6), (511, 1), (512, 0), (600, 0)])
def test_answers_end_at_the_context_limit(target, prompt_length, num_new):
    prompt = [1 + i % 200 for i in range(prompt_length)]
    drafter = FunctionDrafter(lambda sequence, n: [SOME_TOKEN] * n)
    generation = run(target, [GenerationRequest("long", prompt)], drafter=drafter)["long"]
    assert len(generation.completion.token_ids) == num_new
    assert generation.completion.finish_reason == "length"


def test_a_drafter_is_told_every_kept_token_and_the_hidden_states_before_it(target, references):
    reference = references[2]
    layers = (1, 3, 6)
    for num_right in (0, 2, 3):
        drafter = knowing([reference.full], num_right=num_right)
        drafter.aux_layers = layers
        run(target, [reference.request], drafter=drafter)
        with torch.inference_mode():
            output = target.model(torch.tensor([reference.full]), output_hidden_states=True, use_cache=False)
        # Entry 0 is the embedding, so entry i + 1 is the output of layer i.
        true_aux_TLD = torch.stack([output.hidden_states[layer + 1][0] for layer in layers], dim=1)
        told = 0
        for extension, aux_TLD in drafter.extensions:
            assert extension.start == told
            end = told + len(extension.token_ids)
            assert list(extension.token_ids) == reference.full[told + 1 : end + 1]
            error = (aux_TLD[: end - told] - true_aux_TLD[told:end]).abs().max()
            # Float32 sums in another order; the states of a neighbouring token are about as far as they are large.
            assert error < 1e-5 * true_aux_TLD.abs().max()
            told = end
        assert told >= len(reference.full) - 1 - (num_right + 1), "all but the last step"


@pytest.mark.parametrize("drafter", [None, NgramDrafter({})], ids=["no drafter", "n-gram"])
def test_a_sampled_answer_does_not_depend_on_its_batch(target, references, drafter):
    requests = [reference.request for reference in references]
    sampling = Sampling(30, temperature=0.8, top_p=0.9, seed=5)
    together = answers(run(target, requests, sampling, batch_size=5, drafter=drafter))
    alone = answers(run(target, requests[::-1], sampling, batch_size=1, drafter=drafter))
    assert together == alone
    other_seed = answers(run(target, requests, sampling._replace(seed=6), batch_size=5, drafter=drafter))
    assert all(other_seed[id] != together[id] for id in together)


def test_equal_prompts_with_different_ids_are_sampled_apart(target, references):
    prompt = references[1].request.input_ids
    requests = [GenerationRequest(id, prompt) for id in ("a", "b")]
    sampled = answers(run(target, requests, Sampling(20, temperature=1.0), batch_size=2))
    assert sampled["a"] != sampled["b"]


def test_sampling_at_a_temperature_near_zero_is_greedy(target, references):
    requests = [reference.request for reference in references]
    cold = Sampling(NUM_NEW_TOKENS, temperature=1e-4)
    drafter = knowing([reference.full for reference in references], num_right=2)
    assert answers(run(target, requests, cold, batch_size=3, drafter=drafter)) == expected(references)


def test_requests_are_taken_as_rows_become_free(target, references):
    taken = []

    def requests():
        for reference in references:
            taken.append(reference.request.id)
            yield reference.request

    generations = generate(target, requests(), GREEDY, batch_size=2)
    next(generations)
    assert len(taken) <= 3, "two rows were filled, and one of them again at most"


def test_hooks_are_gone_after_a_run_that_was_broken_off(target, references):
    drafter = FunctionDrafter(lambda sequence, n: [SOME_TOKEN] * n, aux_layers=(1,))
    generations = generate(
        target, [reference.request for reference in references], GREEDY, batch_size=1, drafter=drafter
    )
    hooks = target.decoder_layers()[1]._forward_hooks
    num_hooks = len(hooks)
    next(generations)
    assert len(hooks) == num_hooks + 1
    generations.close()
    assert len(hooks) == num_hooks


def test_an_empty_prompt_is_refused(target):
    with pytest.raises(ValueError, match="'void' has an empty prompt"):
        list(generate(target, [GenerationRequest("void", [])], GREEDY, batch_size=1))


@pytest.mark.parametrize(
    ("model_type", "settings", "named"),
    [
        ("gpt_oss", {}, "sliding_attention"),
        ("qwen3_next", {}, "linear_attention"),
        ("mistral", {"sliding_window": 4096}, "sliding_window"),
        ("rwkv", {}, "attention-free"),
    ],
)
def test_targets_that_cannot_be_rewound_are_refused_by_name(model_type, settings, named):
    with pytest.raises(ValueError, match=f"{model_type} has .*{named}"):
        check_rewindable(AutoConfig.for_model(model_type, **settings))


def test_a_target_without_position_ids_is_refused():
    with pytest.raises(ValueError, match="bloom has no max_position_embeddings"):
        check_rewindable(AutoConfig.for_model("bloom"))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_moe", "deepseek_v3"])
def test_targets_of_full_attention_are_accepted(model_type):
    check_rewindable(AutoConfig.for_model(model_type))
