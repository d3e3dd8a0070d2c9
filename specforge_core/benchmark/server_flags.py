"""Arguments of an SGLang server, in the words of the version that is installed. Torch-free.

Stages ask in the words of SGLang 0.5.14. Everything that differs between versions is the two tables here.
"""

import functools
import logging
import re
import subprocess
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from specforge_core.manifest_sections import EngineConfig, ServingConfig, TargetConfig

logger = logging.getLogger(__name__)

Options = Mapping[str, str | int | float | bool]
"""Value by flag. True is a flag without a value, False leaves the flag out."""

# Other words for "FLAG VALUE" or for a flag with any value, the best one first. {} stands for the value.
ALTERNATIVES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "--cuda-graph-max-bs-decode": ("--cuda-graph-max-bs {}",),
        "--cuda-graph-backend-decode disabled": ("--disable-cuda-graph",),
        "--cuda-graph-backend-prefill disabled": ("--disable-piecewise-cuda-graph",),
        "--speculative-draft-model-path": ("--speculative-draft-model {}",),
        "--tp-size": ("--tensor-parallel-size {}",),
    }
)
# A server without these gives the same answers, at another speed or with less to read.
OPTIONAL = frozenset(
    (
        "--cuda-graph-backend-prefill --cuda-graph-max-bs-decode --enable-metrics "
        "--enforce-disable-flashinfer-allreduce-fusion --grammar-backend "
        "--sampling-backend --skip-server-warmup"
    ).split()
)
HELP_TIMEOUT_S = 300.0
NUM_LAST_LINES = 20


class ServerFlags(NamedTuple):
    """Arguments that a server understands."""

    words: tuple[str, ...]
    dropped: tuple[str, ...]
    """Optional flags that it does not have."""


def model_options(target: TargetConfig, *, tensor_parallel: int) -> Options:
    """The options that say what is served: every server of this target has them."""
    return {
        "--model-path": target.model,
        **({"--revision": target.revision} if target.revision else {}),
        "--trust-remote-code": target.trust_remote_code,
        "--dtype": target.dtype,
        "--tp-size": tensor_parallel,
    }


def target_options(target: TargetConfig, engine: EngineConfig) -> Options:
    """The options of a stage's server for this target alone: the baseline."""
    return {
        **model_options(target, tensor_parallel=engine.tensor_parallel),
        # Of target and draft. Left to itself the server falls back to pickles.
        "--load-format": "safetensors",
        # Of each GPU, for weights and KV cache, what is already in use included.
        "--mem-fraction-static": engine.mem_fraction_static,
        "--max-running-requests": engine.max_running_requests,
        "--cuda-graph-max-bs-decode": engine.max_running_requests,
        # Graphs of the prefill take minutes to make and help short prompts alone.
        "--cuda-graph-backend-prefill": "disabled",
        # The one set of backends that neither compiles at the first request nor needs a package of its own.
        "--attention-backend": "triton",
        "--sampling-backend": "pytorch",
        "--grammar-backend": "none",
        "--skip-server-warmup": True,
        "--enable-metrics": True,
    }


def draft_options(draft: Path | str, serving: ServingConfig) -> Options:
    """What a server with an EAGLE-3 draft has on top of its baseline's options, which are otherwise the same."""
    return {
        "--speculative-algorithm": "EAGLE3",
        "--speculative-draft-model-path": str(draft),
        "--speculative-num-steps": serving.num_steps,
        "--speculative-eagle-topk": serving.topk,
        "--speculative-num-draft-tokens": serving.num_draft_tokens,
    }


@functools.cache
def known_flags(program: tuple[str, ...]) -> frozenset[str]:
    """The flags that a server program lists under `--help`. Raises: ValueError if it cannot be run."""
    command = [*program, "--help"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=HELP_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"no SGLang server can be started: {error}") from None
    if done.returncode != 0:
        lines = "\n".join(done.stderr.splitlines()[-NUM_LAST_LINES:])
        # The last line is the one to show where there is room for one.
        raise ValueError(
            f"{lines}\nno SGLang server can be started: `{' '.join(command)}` ended with status {done.returncode} and "
            "the lines above; choose a Python interpreter that has SGLang"
        )
    return flags_in_help(done.stdout)


def flags_in_help(text: str) -> frozenset[str]:
    """The flags that argparse's help text lists, without those that only the description of another one mentions."""
    # Two blanks before a flag's own line, many before its description.
    own_lines = re.findall(r"^  (-.*)$", text, flags=re.MULTILINE)
    # Its description begins after two blanks, and may be on the same line.
    return frozenset(flag for line in own_lines for flag in re.findall(r"--[\w-]+", line.split("  ")[0]))


def resolve_flags(options: Options, known: AbstractSet[str]) -> ServerFlags:
    """The options in words that are among the known flags. Warns once about all optional ones that are not.

    Raises: ValueError naming every required flag that the server has no word for.
    """
    words: list[str] = []
    missing = []
    for flag, value in options.items():
        if value is False:
            continue
        fitting = next((option for option in _wordings(flag, value) if _flags(option) <= known), None)
        if fitting is None:
            missing.append(flag)
        else:
            words += fitting
    dropped = tuple(flag for flag in missing if flag in OPTIONAL)
    if required := [flag for flag in missing if flag not in OPTIONAL]:
        raise ValueError(
            f"this SGLang server does not know {', '.join(required)}: install a version that does (0.5.14 is known to "
            "work), or add its own word for it to ALTERNATIVES in server_flags.py"
        )
    if dropped:
        logger.warning("this SGLang server does not know %s; going on without", ", ".join(dropped))
    return ServerFlags(tuple(words), dropped)


def _wordings(flag: str, value: str | int | float | bool) -> list[list[str]]:
    """An option in the words of each version, the newest first."""
    first = [flag] if value is True else [flag, str(value)]
    others = [*ALTERNATIVES.get(f"{flag} {value}", ()), *ALTERNATIVES.get(flag, ())]
    # Filled in after the split: a path may hold blanks.
    return [first, *([word.format(value) for word in other.split()] for other in others)]


def _flags(words: Sequence[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}
