"""An entry with all that its cost is counted from. Torch-free."""

import math
from typing import NamedTuple

from specforge_core.artifacts import Store
from specforge_core.cost.configs import ConfigReader
from specforge_core.cost.conversations import ExpectedConversations, expected_conversations
from specforge_core.cost.draft_model import add_counts, count_conversation, cut, draft_shape, feature_bytes
from specforge_core.cost.hardware import GPUS_PER_HOST, Hardware
from specforge_core.cost.rates import Rates
from specforge_core.cost.serving import ServerShape
from specforge_core.cost.target_model import target_model
from specforge_core.manifest import ManifestEntry
from specforge_core.training.bench.shapes import RowCounts, Shape

SERVER_START_S = 40.0
"""Until SGLang has imported itself and captured its graphs: 33 to 36 s of the target alone, 40 to 45 s with a draft, in
the build of `demo-8b` on an H100."""


class Job(NamedTuple):
    """An entry with all that its cost is counted from."""

    entry: ManifestEntry
    server: ServerShape
    draft: Shape
    conversations: ExpectedConversations
    documents: ExpectedConversations
    """The same, as training cuts them."""
    counts: RowCounts
    """Of the sample's documents together."""
    rates: Rates
    config_source: str

    @property
    def num_gpus(self) -> int:
        """That the entry holds."""
        return self.entry.resources.num_gpus

    @property
    def num_servers(self) -> int:
        """At once, in regenerate and capture."""
        return max(1, self.num_gpus // self.server.tensor_parallel)

    @property
    def num_hosts(self) -> int:
        """That its GPUs are in."""
        return max(1, math.ceil(self.num_gpus / GPUS_PER_HOST))

    @property
    def scale(self) -> float:
        """All conversations against the sample."""
        return self.documents.num_conversations / len(self.documents.sample)

    @property
    def feature_bytes(self) -> float:
        """Of all features, if they are stored."""
        counts, features = self.counts, self.entry.features
        return self.scale * feature_bytes(self.draft.width, features.dtype, counts.num_tokens, self.num_teaching)

    @property
    def num_teaching(self) -> float:
        """Tokens of the sample whose last hidden state is kept: one for each token of an answer."""
        return self.documents.answer_tokens_each * len(self.documents.sample)

    @property
    def is_live(self) -> bool:
        """Whether features are consumed as they are made, and never stored."""
        return self.entry.features.mode == "live"

    @property
    def load_s(self) -> float:
        """In which the target's weights come from the disk; whoever loads them next finds them in the host's memory."""
        return self.server.model.weight_bytes / self.rates.read_bytes_per_s

    def servers_start_s(self, num_starts: int) -> float:
        """Of servers one after the other, or of all at once, which is one start."""
        return num_starts * SERVER_START_S + self.load_s

    @property
    def served_bytes_per_gpu(self) -> float:
        """What a server takes, whatever it holds."""
        return self.entry.engine.mem_fraction_static * self.server.hardware.memory_bytes

    @property
    def num_slots(self) -> int:
        """Requests that a server decodes at once: as many as are allowed, and fit."""
        fit = self.server.kv_tokens(self.entry.engine.mem_fraction_static) / self.conversations.tokens_each
        return max(1, min(self.entry.engine.max_running_requests, int(fit)))


def make_job(
    entry: ManifestEntry,
    *,
    configs: ConfigReader,
    store: Store | None,
    rates: Rates,
    hardware: Hardware,
    tokens_per_conversation: tuple[int, int] | None = None,
) -> Job:
    """The job of an entry. Raises: ValueError if something that its cost depends on is not known."""
    if entry.resources.num_gpus == 0:
        raise ValueError(f"{entry.name} is built on a CPU, whose rates nothing has measured; its cost is not counted")
    found = configs.read(entry.target)
    model = target_model(found.values, entry.target)
    conversations = expected_conversations(entry, store, tokens_per_conversation)
    kept = [cut(conversation, entry.training.max_document_tokens) for conversation in conversations.sample]
    return Job(
        entry=entry,
        server=ServerShape(model, hardware, entry.engine.tensor_parallel),
        draft=draft_shape(entry.draft, found.values, model),
        conversations=conversations,
        documents=conversations._replace(sample=tuple(kept)),
        counts=add_counts(count_conversation(conversation, entry.draft.num_steps) for conversation in kept),
        rates=rates,
        config_source=found.source,
    )
