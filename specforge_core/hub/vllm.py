"""How a draft is served by vLLM, in commands to be pasted. Torch-free; nothing here has been run with a server."""

import json
from pathlib import PurePosixPath

from specforge_core.benchmark.sweep import shell_word
from specforge_core.export.verify_speculators import SPECULATORS_FOLDER
from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_sections import TargetConfig

# The oldest releases whose code was read. Up to 0.24 the flags of EAGLE-3.1 were dropped on the way from this format to
# the model (vllm-project/vllm pull request 46488), and the draft ran without its norms.
OLDEST_VERSION, OLDEST_VERSION_WITH_NORMS = "0.20", "0.25"


def has_norms(entry: ManifestEntry) -> bool:
    """Whether the draft has a part of EAGLE-3.1 that older releases leave out."""
    return entry.draft.fc_norm or entry.draft.norm_output


def oldest_version(entry: ManifestEntry) -> str:
    """The first vLLM release known to read this draft's config as it is meant."""
    return OLDEST_VERSION_WITH_NORMS if has_norms(entry) else OLDEST_VERSION


def vllm_commands(
    target: TargetConfig, repository: str | None, *, num_speculative_tokens: int, tensor_parallel: int
) -> str:
    """The commands that fetch the draft and serve the target with it.

    Args: repository: on the Hub; None for whoever stands in the draft's folder.
    """
    folder = PurePosixPath(repository).name if repository else "."
    draft = {
        "method": "eagle3",
        # Of a Hub id the server would read the root, which is SGLang's.
        "model": f"{folder}/{SPECULATORS_FOLDER}",
        "num_speculative_tokens": num_speculative_tokens,
    }
    words = [
        f"vllm serve {shell_word(target.model)}",
        *([f"--revision {target.revision}"] if target.revision else []),
        *(["--trust-remote-code"] if target.trust_remote_code else []),
        # The draft's own, and what SGLang takes in its place, too.
        f"--dtype {'bfloat16' if target.dtype == 'float32' else target.dtype}",
        f"--tensor-parallel-size {tensor_parallel}",
        f"--speculative-config {shell_word(json.dumps(draft))}",
    ]
    serve = " \\\n  ".join(words)
    if repository is None:
        return serve
    fetch = f'hf download {shell_word(repository)} --include "{SPECULATORS_FOLDER}/*" --local-dir {shell_word(folder)}'
    return f"{fetch}\n{serve}"
