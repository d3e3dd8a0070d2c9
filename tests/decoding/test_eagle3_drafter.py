import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from specforge_core.decoding.drafters import Extension
from specforge_core.decoding.eagle3_drafter import Eagle3Drafter, load_eagle3_drafter
from specforge_core.decoding.speculative import generate
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.manifest_sections import Eagle3Config
from specforge_core.targets import Sampling
from specforge_core.targets.hf import HFTarget
from tests.decoding.conftest import NUM_NEW_TOKENS
from tests.drafts.eagle3_brute_force import Document, Shape, hidden_states, rms
from tests.drafts.synthetic import KEPT, TARGET_CONFIG, VOCAB_SIZE, WIDTH, make_draft, make_head

NUM_STEPS = 3
FLAGS = [{}, {"num_key_value_heads": 2}, {"fc_norm": True, "norm_output": True}]


class Chain(NamedTuple):
    token_ids: list[int]
    first_hidden_D: Tensor
    """What the second step takes from the first."""


def chain_by_definition(draft: Eagle3Draft, tokens: list[int], aux_hidden_TLD: Tensor) -> Chain:
    """The chain after `tokens`, recomputed from nothing by the definition for every token of it."""
    weights = {name: tensor.double() for name, tensor in draft.state_dict().items()}
    shape = Shape.of(draft.serving_config(), num_steps=NUM_STEPS)
    slot = len(tokens) - 2
    # The chain's own positions have no states of the target: NaN shows if one is read.
    no_state_TLD = torch.full((NUM_STEPS, *aux_hidden_TLD.shape[1:]), torch.nan, dtype=torch.float64)
    a = torch.cat((aux_hidden_TLD, no_state_TLD))
    chain: list[int] = []
    for step in range(NUM_STEPS):
        x = tokens + chain
        outputs = hidden_states(weights, shape, make_head().embedding_VD.double(), Document(x, [True] * len(x), a, a))
        normed_D = rms(outputs[step][slot], weights["norm.weight"], shape.eps)
        chain.append(KEPT[int((weights["lm_head.weight"] @ normed_D).argmax())])
    first_hidden_D = outputs[0][slot]
    return Chain(chain, rms(first_hidden_D, weights["norm.weight"], shape.eps) if shape.norm_output else first_hidden_D)


class Text:
    """Random tokens and random hidden states of the target, one row of a batch."""

    def __init__(self, seed: int, length: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
        self.aux_TLD = torch.randn(length, 3, WIDTH, generator=generator).double()

    def extension(self, start: int, end: int) -> Extension:
        return Extension(start, self.tokens[start + 1 : end + 1])

    def chain(self, draft: Eagle3Draft, end: int) -> Chain:
        return chain_by_definition(draft, self.tokens[: end + 1], self.aux_TLD[:end])


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_chains_are_those_of_the_definition_through_prefill_extension_and_rejection(flags):
    draft = make_draft(**flags)
    drafter = Eagle3Drafter(draft)
    drafter.begin(num_rows=2)
    texts = [Text(1, 12), Text(2, 12)]
    ends = [3, 5]
    for row, (text, end) in enumerate(zip(texts, ends, strict=True)):
        drafter.extend(row, [text.extension(0, end)], text.aux_TLD[None, :end])
    seen = set()
    # The rows keep 1 and 4 tokens, then 3 and 1: what was rejected in between must leave no trace.
    for kept in ((1, 4), (3, 1), (0, 0)):
        chains = [text.chain(draft, end) for text, end in zip(texts, ends, strict=True)]
        torch.testing.assert_close(drafter.hidden_RD, torch.stack([chain.first_hidden_D for chain in chains]))
        proposed = drafter.propose([t.tokens[: end + 1] for t, end in zip(texts, ends, strict=True)], NUM_STEPS)
        assert proposed == [chain.token_ids for chain in chains]
        seen.update(map(tuple, proposed))
        new_ends = [end + n for end, n in zip(ends, kept, strict=True)]
        aux_BTLD = torch.full((2, NUM_STEPS + 1, 3, WIDTH), 99.0, dtype=torch.float64)
        for row, (text, end, new_end) in enumerate(zip(texts, ends, new_ends, strict=True)):
            aux_BTLD[row, : new_end - end] = text.aux_TLD[end:new_end]
        if any(kept):
            extensions = [t.extension(end, new) for t, end, new in zip(texts, ends, new_ends, strict=True)]
            drafter.extend(0, extensions, aux_BTLD)
        ends = new_ends
    assert len(seen) >= 4, "a draft that always proposes the same would hide mistakes"


def test_a_copied_row_goes_on_like_the_original():
    draft = make_draft()
    drafter = Eagle3Drafter(draft)
    drafter.begin(num_rows=3)
    text = Text(3, 9)
    drafter.extend(0, [Text(4, 9).extension(0, 8)], Text(4, 9).aux_TLD[None, :8])
    drafter.extend(2, [text.extension(0, 5)], text.aux_TLD[None, :5])
    drafter.copy_row(2, 0)
    assert drafter.propose([text.tokens[:6]], NUM_STEPS) == [text.chain(draft, 5).token_ids]
    drafter.extend(0, [text.extension(5, 8)], text.aux_TLD[None, 5:8])
    assert drafter.propose([text.tokens], NUM_STEPS) == [text.chain(draft, 8).token_ids]


@pytest.fixture(scope="module")
def exported(target: HFTarget, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained draft of the tiny target with a draft vocabulary of half the target's, as the exporter writes it."""
    torch.manual_seed(7)
    directory = tmp_path_factory.mktemp("draft")
    draft = Eagle3Draft.create(
        Eagle3Config(num_steps=3, draft_vocab_size=130),
        target.config.to_dict(),
        target.load_target_head(),
        torch.arange(0, 260, 2)[:130].clamp(max=258),
        Eagle3Draft.capture_layers(None, target.num_layers),
    )
    (directory / "config.json").write_text(json.dumps(draft.serving_config()))
    save_file(draft.serving_state_dict(), directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_exported_draft_changes_no_greedy_answer(target, references, exported, batch_size):
    drafter = load_eagle3_drafter(exported, target)
    assert drafter.aux_layers == (1, 3, 4)
    requests = [reference.request for reference in references]
    generations = list(generate(target, requests, Sampling(NUM_NEW_TOKENS), batch_size=batch_size, drafter=drafter))
    expected = {reference.request.id: tuple(reference.answer) for reference in references}
    assert {g.completion.id: g.completion.token_ids for g in generations} == expected


def test_a_drafter_shares_the_targets_embedding(target, exported):
    drafter = load_eagle3_drafter(exported, target)
    assert drafter.draft.embed_tokens.data_ptr() == target.model.get_input_embeddings().weight.data_ptr()
    assert TARGET_CONFIG["vocab_size"] != target.config.vocab_size
