"""Options come out in the words of the installed version, and never silently change."""

import logging
import sys
from pathlib import Path

import pytest

from specforge_core.benchmark.server_flags import (
    Options,
    draft_options,
    flags_in_help,
    known_flags,
    resolve_flags,
    target_options,
)
from specforge_core.manifest_sections import EngineConfig, ServingConfig
from specforge_core.stages import ResolvedTarget
from tests.sglang_like import MODULE

# As argparse prints it.
HELP = """\
usage: launch_server.py [-h] --model-path MODEL_PATH [--dtype {auto,half}]

options:
  -h, --help            show this help message and exit
  --model-path MODEL_PATH, --model MODEL_PATH
                        The path of the weights. Not with --gone-flag.
  --dtype {auto,half}   As in --older-flag, see
  --tp-size TP_SIZE     --newer-flag
"""


def test_flags_are_read_from_their_own_lines_alone() -> None:
    assert flags_in_help(HELP) == {"--help", "--model-path", "--model", "--dtype", "--tp-size"}


def test_values_switches_and_left_out_flags() -> None:
    known = {"--model-path", "--trust-remote-code", "--mem-fraction-static", "--enable-metrics"}
    options: Options = {
        "--model-path": "/a b/c",
        "--trust-remote-code": False,
        "--enable-metrics": True,
        "--mem-fraction-static": 0.8,
    }
    words = ("--model-path", "/a b/c", "--enable-metrics", "--mem-fraction-static", "0.8")
    assert resolve_flags(options, known) == (words, ())


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ("--cuda-graph-max-bs-decode --cuda-graph-max-bs", "--cuda-graph-max-bs-decode 64"),
        ("--cuda-graph-max-bs", "--cuda-graph-max-bs 64"),
    ],
)
def test_a_renamed_flag_is_found_under_its_other_name(known: str, words: str) -> None:
    assert resolve_flags({"--cuda-graph-max-bs-decode": 64}, set(known.split())).words == tuple(words.split())


def test_an_alternative_for_one_value_serves_no_other() -> None:
    known = {"--disable-cuda-graph"}
    option = "--cuda-graph-backend-decode"
    assert resolve_flags({option: "disabled"}, known).words == ("--disable-cuda-graph",)
    with pytest.raises(ValueError, match=option):
        resolve_flags({option: "full"}, known)


def test_an_alternative_keeps_blanks_in_its_value() -> None:
    resolved = resolve_flags({"--speculative-draft-model-path": "/my drafts/a"}, {"--speculative-draft-model"})
    assert resolved.words == ("--speculative-draft-model", "/my drafts/a")


def test_unknown_optional_flags_are_dropped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    options: Options = {"--enable-metrics": True, "--model-path": "a", "--grammar-backend": "none"}
    with caplog.at_level(logging.WARNING):
        resolved = resolve_flags(options, {"--model-path"})
    assert resolved == (("--model-path", "a"), ("--enable-metrics", "--grammar-backend"))
    assert len(caplog.records) == 1
    assert "--enable-metrics, --grammar-backend" in caplog.text


def test_all_unknown_required_flags_are_named_at_once() -> None:
    with pytest.raises(ValueError, match="does not know --forward-hooks, --dtype: install"):
        resolve_flags({"--forward-hooks": "[]", "--dtype": "half", "--model-path": "a"}, {"--model-path"})


def test_baseline_and_draft_server_differ_in_the_draft_alone() -> None:
    target = ResolvedTarget(model="/models/target", content_id="x", revision="abc", dtype="bfloat16")
    baseline = target_options(target, EngineConfig(tensor_parallel=2, max_running_requests=32, mem_fraction_static=0.7))
    draft = draft_options(Path("/drafts/one"), ServingConfig())
    known = known_flags((sys.executable, "-m", MODULE))
    words = " ".join(resolve_flags({**baseline, **draft}, known).words)
    assert words == (
        "--model-path /models/target --revision abc --dtype bfloat16 --tp-size 2 --load-format safetensors "
        "--mem-fraction-static 0.7 --max-running-requests 32 --cuda-graph-max-bs-decode 32 "
        "--cuda-graph-backend-prefill disabled --attention-backend triton --sampling-backend pytorch "
        "--grammar-backend none --skip-server-warmup --enable-metrics --speculative-algorithm EAGLE3 "
        "--speculative-draft-model-path /drafts/one --speculative-num-steps 3 --speculative-eagle-topk 1 "
        "--speculative-num-draft-tokens 4"
    )
    assert words.startswith(" ".join(resolve_flags(baseline, known).words))


def test_an_interpreter_without_sglang_is_refused_with_its_own_words() -> None:
    with pytest.raises(
        ValueError, match=r"No module named nothing_like_sglang\n.* choose a Python interpreter that has SGLang$"
    ):
        known_flags((sys.executable, "-m", "nothing_like_sglang"))
    with pytest.raises(ValueError, match=r"no SGLang server can be started.*/no/python"):
        known_flags(("/no/python", "-m", MODULE))
