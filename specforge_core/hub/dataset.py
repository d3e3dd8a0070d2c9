"""The regenerated conversations of an entry as a data set repository: its Parquet shards and its card. Torch-free."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData

from specforge_core.artifacts import Artifact
from specforge_core.benchmark.tables import markdown_table
from specforge_core.data.conversations import SHARD_GLOB, conversation_shards
from specforge_core.facts import Conversations
from specforge_core.hub.repository import LICENSE_FOLDER, license_files
from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_sections import BUILTIN_DEMO
from specforge_core.stages import ResolvedData, ResolvedTarget

TEMPLATE_NAME = "dataset_card.md"


def dataset_files(
    entry: ManifestEntry, data: ResolvedData, target: ResolvedTarget, conversations: Artifact[Conversations]
) -> dict[str, Path | bytes]:
    """The files of the data set's repository, by name: where each lies now, or its content."""
    licenses = {f"{LICENSE_FOLDER}/{path.name}": path for path in license_files(target)}
    card = dataset_card(entry, data, target, conversations, license_names=sorted(licenses))
    shards = {shard.name: shard for shard in conversation_shards(conversations.path)}
    return {**shards, **licenses, "README.md": card.encode()}


def dataset_card(
    entry: ManifestEntry,
    data: ResolvedData,
    target: ResolvedTarget,
    conversations: Artifact[Conversations],
    *,
    license_names: Sequence[str],
) -> str:
    """The text of the repository's README.md, with its metadata.

    Args: data: the prompts with their commits or digests; license_names: of the target's licence texts in there.
    """
    facts = conversations.facts
    template = resources.files("specforge_core.hub").joinpath(TEMPLATE_NAME).read_text(encoding="utf-8")
    card = DatasetCard.from_template(
        card_data=DatasetCardData(
            # Of several owners: the text says whose.
            license="other",
            task_categories=["text-generation"],
            tags=["speculative-decoding", "regenerated", "specbundle"],
            source_datasets=[s.dataset for s in data.sources if s.revision] or None,
            configs=[{"config_name": "default", "data_files": [{"split": "train", "path": SHARD_GLOB}]}],
        ),
        template_str=template,
        repository=entry.publish.dataset or entry.name,
        draft_repository=entry.publish.repository,
        target=entry.target.model,
        target_version=target.revision or target.content_id,
        counts=markdown_table(
            [
                {
                    "conversations": f"{facts.num_conversations:,}",
                    "tokens": f"{facts.num_tokens:,}",
                    "written by the target": f"{facts.num_loss_tokens:,}",
                    "cut off": f"{facts.num_cut_off:,}",
                    "prompts without a usable answer": f"{facts.num_failed:,}",
                }
            ]
        ),
        sources=markdown_table(_source_rows(entry, data)),
        data=entry.data,
        chat_template_sha256=facts.chat_template_sha256,
        key=conversations.key,
        content_id=conversations.content_id,
        files=markdown_table(
            [
                {"file": name, "bytes": f"{file.size_bytes:,}", "sha256": f"`{file.sha256}`"}
                for name, file in conversations.files.items()
            ]
        ),
        license_files=license_names,
        license_name=entry.publish.license,
    )
    return str(card)


def _source_rows(entry: ManifestEntry, data: ResolvedData) -> list[dict[str, str]]:
    # As the manifest names them: a resolved path would say how this machine's folders are called.
    return [
        {
            "source": f"`{named.dataset}`" + (", written by a program" if named.dataset == BUILTIN_DEMO else ""),
            "configuration": named.config or "",
            "split": named.split,
            "conversations": f"the first {named.limit:,}" if named.limit else "all",
            "commit or digest": f"`{resolved.content_id}`",
        }
        for named, resolved in zip(entry.data.sources, data.sources, strict=True)
    ]
