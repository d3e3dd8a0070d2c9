"""The manifest: what loads, and what every mistake says. Line numbers are counted by eye in the texts below."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from specforge_core.manifest import Manifest, ManifestEntry
from specforge_core.manifest_errors import ManifestError
from specforge_core.manifest_sections import Eagle3Config, TrainingConfig

SHIPPED = Path(__file__).parents[1] / "bundle_manifest.yaml"
# 16 lines; an entry's own sections may follow from line 17 on.
VALID = """\
version: 1
defaults:
  data:
    sources:
      - {dataset: prompts.jsonl}
  training:
    learning_rate: 1e-4
    betas: [0.9, 0.95]
  benchmark:
    suites:
      - name: math
        source: {dataset: math.jsonl}
entries:
  - name: one
    target:
      model: some/target
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "bundle_manifest.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def errors_of(tmp_path: Path, text: str) -> list[str]:
    """The lines of the error, without the folder."""
    with pytest.raises(ManifestError) as raised:
        Manifest.load(write(tmp_path, text))
    return str(raised.value).replace(f"{tmp_path}/", "").splitlines()


def test_the_shipped_manifest_holds_the_demo_and_every_target_of_the_bundle() -> None:
    manifest = Manifest.load(SHIPPED)
    by_name = {entry.name: entry for entry in manifest.entries}
    assert by_name["demo"].resources.num_gpus == 0
    assert manifest.base_dir == SHIPPED.parent
    assert {entry.target.model for name, entry in by_name.items() if name != "demo"} == {
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Llama-3.3-70B-Instruct",
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8",
        "Qwen/Qwen3-8B",
        "Qwen/Qwen3-30B-A3B-Instruct-2507",
        "Qwen/Qwen3-235B-A22B-Instruct-2507",
        "Qwen/Qwen3-Next-80B-A3B-Instruct-FP8",
        "Qwen/Qwen3-Coder-30B-A3B-Instruct",
        "Qwen/Qwen3-Coder-480B-A35B-Instruct",
        "openai/gpt-oss-20b",
        "openai/gpt-oss-120b",
        "inclusionAI/Ling-flash-2.0",
        "moonshotai/Kimi-K2-Instruct",
    }


def test_defaults_merge_section_by_section_and_lists_replace(tmp_path: Path) -> None:
    text = VALID + "    training: {num_epochs: 5}\n    data: {sources: [{dataset: own.jsonl}], seed: 7}\n"
    (entry,) = Manifest.load(write(tmp_path, text)).entries
    assert (entry.training.num_epochs, entry.training.learning_rate) == (5, 1e-4)
    assert [source.dataset for source in entry.data.sources] == ["own.jsonl"]
    assert entry.data.seed == 7


def test_scalars_are_read_as_yaml_1_2_reads_them(tmp_path: Path) -> None:
    text = VALID + "    data: {sources: [{dataset: own.jsonl, split: no, config: 2024-01-01}], seed: 1_000}\n"
    (entry,) = Manifest.load(write(tmp_path, text)).entries
    (source,) = entry.data.sources
    assert (source.split, source.config, entry.data.seed) == ("no", "2024-01-01", 1000)


@pytest.mark.parametrize(
    ("addition", "line", "message"),
    [
        ("    training: {learning_rat: 1}", 17, 'training.learning_rat: unknown key; did you mean "learning_rate"?'),
        ("    gate: {}", 17, 'gate: unknown key; did you mean "gates"?'),
        ("    resources: {xyz: 1}", 17, "resources.xyz: unknown key; known: num_gpus"),
        ("    training:\n      num_epochs: '3'", 18, 'training.num_epochs: should be a whole number, got "3"'),
        ("    resources: {num_gpus: true}", 17, "resources.num_gpus: should be a whole number, got true"),
        ("    resources: {num_gpus: 1.5}", 17, "resources.num_gpus: should be a whole number, got 1.5"),
        ("    training: 5", 17, "training: should be a section of keys and values, got 5"),
        ("    draft:", 17, "draft: should be a section of keys and values, got null"),
        ("    data: {sources: a.jsonl}", 17, 'data.sources: should be a list, got "a.jsonl"'),
        ("    data: {sources: []}", 17, "data.sources: should not be empty, got []"),
        (
            "    features: {dtype: int8}",
            17,
            "features.dtype: should be 'bfloat16', 'float32' or 'float8', got \"int8\"",
        ),
        ("    training: {learning_rate: -1}", 17, "training.learning_rate: should be greater than 0, got -1"),
        ("    training: {learning_rate: .inf}", 17, "training.learning_rate: should be a finite number, got Infinity"),
        ("    training: {learning_rate: .nan}", 17, "training.learning_rate: should be a finite number, got NaN"),
        ("    training: {betas: [0.9, 1.0]}", 17, "training.betas[1]: should be less than 1, got 1.0"),
        ("    draft: {num_steps: 99}", 17, "draft.num_steps: should be less than or equal to 16, got 99"),
        ("    draft: {aux_layers: [1, 2]}", 17, "draft.aux_layers[2]: is required, "),
        ("    draft: {aux_layers: [1, 3, 3]}", 17, "draft.aux_layers: [1, 3, 3] should be three different layers"),
        ("    draft: {aux_layers: [-1, 3, 4]}", 17, "draft.aux_layers: [-1, 3, 4] should be three different layers"),
        (
            "    draft:\n      num_attention_heads: 6\n      num_key_value_heads: 4",
            19,
            "draft.num_key_value_heads: 4 KV heads cannot be shared evenly by num_attention_heads=6",
        ),
        (
            "    training:\n      tokens_per_batch: 4096",
            17,
            "training.tokens_per_micro_batch: 8192 is more than tokens_per_batch=4096, of which it is a part; "
            "lower it or raise tokens_per_batch",
        ),
        (
            "    training:\n      tokens_per_batch: 20000",
            18,
            "training.tokens_per_batch: 20000 is no multiple of tokens_per_micro_batch=8192, so a step would have "
            "16384; set it to that or to 24576",
        ),
        (
            "    training:\n      tokens_per_micro_batch: 99\n      max_document_tokens: 100",
            19,
            "training.max_document_tokens: 100 is more than tokens_per_micro_batch=99",
        ),
        (
            "    benchmark:\n      serving:\n        - {num_steps: 3, num_draft_tokens: 5}",
            19,
            "benchmark.serving[0].num_draft_tokens: 5 does not fit num_steps=3: a chain verifies num_steps + 1 = 4",
        ),
        (
            "    benchmark:\n      serving:\n        - {concurrency: 1}\n        - {num_steps: 3}",
            20,
            "benchmark.serving[1]: is the same as an earlier one; remove it",
        ),
        (
            "    benchmark:\n      suites:\n        - {name: a, source: {dataset: x.jsonl}}\n"
            "        - {name: a, source: {dataset: y.jsonl}}",
            20,
            'benchmark.suites[1].name: "a" is another suite\'s name already; choose another',
        ),
        (
            "    benchmark: {suites: [{name: ../a, source: {dataset: x.jsonl}}]}",
            17,
            'benchmark.suites[0].name: "../a" should be 1 to 64 of',
        ),
        (
            "    benchmark: {suites: [{name: a, source: {dataset: x.jsonl}, answer: {kind: letter}}]}",
            17,
            "benchmark.suites[0].answer.kind: should be 'number', 'math' or 'choice', got \"letter\"",
        ),
        (
            "    benchmark: {suites: [{name: a, source: {dataset: x.jsonl}, answer: {kind: math, colum: b}}]}",
            17,
            'benchmark.suites[0].answer.colum: unknown key; did you mean "column"?',
        ),
        (
            "    benchmark: {suites: [{name: a, source: {dataset: x.jsonl, column: b}, "
            "answer: {kind: math, column: b}}]}",
            17,
            'benchmark.suites[0].answer.column: "b" is source.column, the prompt; name the column with the answer',
        ),
        (
            "    benchmark: {suites: [{name: a, source: {dataset: 'builtin:demo'}, "
            "answer: {kind: number, column: b}}]}",
            17,
            'benchmark.suites[0].answer.column: builtin:demo has no "b"; its answers are in "final_answer"',
        ),
        (
            "    data: {sources: [{dataset: 'builtin:nothing'}]}",
            17,
            'data.sources[0].dataset: "builtin:nothing" is not built in; the only one is "builtin:demo"',
        ),
        (
            "    gates: {min_acceptance_length: 4.5}",
            17,
            "gates.min_acceptance_length: 4.5 can never be reached: a step of the shortest chain in benchmark.serving "
            "emits at most 4 tokens",
        ),
        (
            "    resources: {num_gpus: 2}\n    training: {tokens_per_batch: 8192}",
            18,
            "training.tokens_per_batch: 8192 is 1 micro-batches of 8192 tokens, too few for resources.num_gpus=2",
        ),
        (
            "    resources: {num_gpus: 2}\n    features:\n      {mode: live}",
            18,
            "features.serve_gpus: with resources.num_gpus=2 it should be 1 to 1, not left out: these GPUs run the "
            "target, the others train",
        ),
        (
            "    resources: {num_gpus: 2}\n    features:\n      mode: live\n      serve_gpus: 2",
            20,
            "features.serve_gpus: with resources.num_gpus=2 it should be 1 to 1, not 2",
        ),
        (
            "    resources: {num_gpus: 0}\n    engine: {name: transformers}\n"
            "    features:\n      mode: live\n      serve_gpus: 1",
            21,
            "features.serve_gpus: with resources.num_gpus=0 it should be left out, not 1",
        ),
        (
            "    features:\n      mode: live\n      serve_gpus: 1",
            18,
            "features.mode: live needs a GPU that serves and one that trains, resources.num_gpus is 1",
        ),
        (
            "    features:\n      serve_gpus: 1",
            18,
            "features.serve_gpus: 1 is for mode: live, where the target runs beside; remove it",
        ),
        (
            "    resources: {num_gpus: 8}\n    engine: {tensor_parallel: 2}\n    training: {tokens_per_batch: 65536}\n"
            "    features:\n      mode: live\n      serve_gpus: 3",
            22,
            "features.serve_gpus: 3 is no multiple of engine.tensor_parallel=2, so GPUs would stay idle; change one",
        ),
        (
            "    resources: {num_gpus: 4}\n    engine: {name: transformers}\n    training: {tokens_per_batch: 65536}\n"
            "    features:\n      mode: live\n      serve_gpus: 2",
            22,
            "features.serve_gpus: 2 needs engine.name: sglang; transformers runs on one GPU",
        ),
        (
            "    resources: {num_gpus: 4}\n    features: {mode: live, serve_gpus: 1}\n"
            "    training: {tokens_per_batch: 16384}",
            19,
            "training.tokens_per_batch: 16384 is 2 micro-batches of 8192 tokens, too few for resources.num_gpus - "
            "features.serve_gpus=3",
        ),
        (
            "    resources: {num_gpus: 4}\n    training: {parallel: {cp: 3}}",
            18,
            "training.parallel: cp=3 x tp=1 does not divide resources.num_gpus=4; change one of them",
        ),
        (
            "    training: {parallel: {tp: 2}}\n    draft: {num_attention_heads: 9, num_key_value_heads: 3}\n"
            "    resources: {num_gpus: 2}",
            17,
            "training.parallel.tp: 2 does not divide draft.num_key_value_heads=3; choose a divisor of it",
        ),
        (
            "    training: {parallel: {tp: 2}, optimizer: muon}\n    resources: {num_gpus: 2}",
            17,
            "training.parallel.tp: 2 splits the matrices that optimizer=muon orthogonalises as a whole",
        ),
        (
            "    resources: {num_gpus: 4}\n    training: {parallel: {cp: 2}, tokens_per_batch: 8192}",
            18,
            "training.tokens_per_batch: 8192 is 1 micro-batches of 8192 tokens, too few for resources.num_gpus=4 in "
            "replicas of 2",
        ),
        ("    gates: {min_speedup: 4.5}", 17, "gates.min_speedup: 4.5 can never be reached: a step emits at most 4"),
        (
            "    gates: {min_speedup: 1.5}\n    benchmark: {serving: [{concurrency: 8}]}",
            17,
            "gates.min_speedup: 1.5 is required at concurrency 1, where nothing is measured",
        ),
        (
            "    gates: {thresholds: [{suite: no-such, concurrency: 8, min_speedup: 1.5}]}",
            17,
            "gates.thresholds[0]: is for nothing that benchmark measures: suite no-such at concurrency 8; correct its",
        ),
        (
            "    gates: {thresholds: [{concurrency: 1}]}",
            17,
            "gates.thresholds[0].min_acceptance_length: is missing, and so is min_speedup; a threshold needs one",
        ),
        (
            "    draft: {num_steps: 2}\n    benchmark: {serving: [{num_steps: 5, num_draft_tokens: 6}]}",
            18,
            "benchmark.serving[0].num_steps: 5 is more than 4, 2 times the draft.num_steps=2 that training unrolls",
        ),
        (
            "    engine:\n      name: sglang\n    resources: {num_gpus: 0}",
            18,
            "engine.name: sglang needs a GPU, resources.num_gpus is 0; set `transformers` or raise num_gpus",
        ),
        (
            "    engine:\n      tensor_parallel: 2\n    resources: {num_gpus: 3}\n"
            "    training: {tokens_per_batch: 24576}",
            18,
            "engine.tensor_parallel: 2 does not divide resources.num_gpus=3, so GPUs would stay idle; "
            "choose a divisor of it",
        ),
        (
            "    engine: {tensor_parallel: 65}",
            17,
            "engine.tensor_parallel: should be less than or equal to 64, got 65",
        ),
        (
            "    engine: {mem_fraction_static: 1.0}",
            17,
            "engine.mem_fraction_static: should be less than 1, got 1.0",
        ),
        ("    engine: {name: vllm}", 17, "engine.name: should be 'sglang' or 'transformers', got \"vllm\""),
        (
            "      dtype: float32",
            17,
            "target.dtype: SGLang serves no float32 target; set bfloat16, or engine.name: transformers",
        ),
        (
            "    engine:\n      max_running_requests: 7\n    benchmark: {serving: [{}, {concurrency: 8}]}",
            18,
            "engine.max_running_requests: 7 is less than 8, the highest concurrency of benchmark; raise it",
        ),
        (
            "    engine:\n      max_running_requests: 63\n    benchmark: {sweep: {}}",
            18,
            "engine.max_running_requests: 63 is less than 64, the highest concurrency of benchmark; raise it",
        ),
        (
            "    engine: {name: transformers}\n    benchmark:\n      serving:\n        - {}\n"
            "        - {num_steps: 3, topk: 4, num_draft_tokens: 8}",
            21,
            "benchmark.serving[1].topk: 4 makes trees, which need engine.name: sglang; set it to 1",
        ),
        (
            "    engine: {name: transformers}\n    benchmark:\n      sweep: {}",
            19,
            "benchmark.sweep: needs engine.name: sglang; set it to null to do without",
        ),
        (
            # One step of a tree drafts topk tokens: 1 + 4 with the pending one, and 16 more with each further step.
            "    benchmark:\n      serving:\n        - {num_steps: 2, topk: 4, num_draft_tokens: 22}",
            19,
            "benchmark.serving[0].num_draft_tokens: 22 is more than 21, all tokens of a tree of num_steps=2 with "
            "topk=4 and the pending one; lower it",
        ),
        (
            "    benchmark:\n      sweep:\n        chains: [[3, 1, 4], [3, 1, 5]]",
            19,
            "benchmark.sweep.chains[1].num_draft_tokens: 5 does not fit num_steps=3: a chain verifies num_steps "
            "+ 1 = 4",
        ),
        (
            "    benchmark:\n      sweep:\n        chains: []",
            19,
            "benchmark.sweep.chains: a sweep needs a chain and a concurrency; remove `sweep` to do without",
        ),
        ("    publish: {repository: ../..}", 17, 'publish.repository: "../.." should be a Hub id'),
        ("    publish: {dataset: a/b--c}", 17, 'publish.dataset: "a/b--c" is no Hub id: none has ".." or "--" in it'),
        (
            "    publish: {repository: a/" + "b" * 95 + "}",
            17,
            'publish.repository: "a/' + "b" * 95 + '" has 97 characters, a Hub id at most 96; shorten it',
        ),
        ("    publish: {to: hub}", 17, "publish.repository: is needed for `to: hub`; name it as organization/name"),
        ("    publish: {to: hup}", 17, "publish.to: should be 'directory' or 'hub', got \"hup\""),
        (
            "    publish: {directory: ../elsewhere}",
            17,
            'publish.directory: "../elsewhere" leaves the store; name a folder in it, or an absolute path',
        ),
        (
            "    publish: {collection: a/b}",
            17,
            'publish.collection: "a/b" should be the title of a collection, without "/", or a whole slug such as',
        ),
        ("    gates: {}\n    gates: {}", 18, "gates: is there already, on line 17; keep one"),
        ("    gates: {min_speedup: !x 1}", 17, "gates.min_speedup: the tag !x is not allowed here"),
        ("    gates: {min_speedup: !!float 1}", 17, "gates.min_speedup: the tag tag:yaml.org,2002:float is not"),
    ],
)
def test_a_mistake_in_an_entry_names_line_entry_key_and_way_out(
    tmp_path: Path, addition: str, line: int, message: str
) -> None:
    errors = errors_of(tmp_path, VALID + addition)
    assert [error for error in errors if error.startswith(f'bundle_manifest.yaml:{line}: entry "one": {message}')], (
        errors
    )
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "bundle_manifest.yaml:1: is empty; it needs `version: 1` and `entries:`"),
        ("# only a comment\n", "bundle_manifest.yaml:1: is empty; it needs `version: 1` and `entries:`"),
        ("version: 1\nentries: [\n", "bundle_manifest.yaml:3: is no valid YAML: "),
        ("version: 1\n\tentries: 1\n", "bundle_manifest.yaml:2: is no valid YAML: "),
        ("version: 1\n---\nversion: 1\n", "bundle_manifest.yaml:2: is no valid YAML: "),
        ("version: 1\nx: \x07\n", "bundle_manifest.yaml:2: is no valid YAML: the character with code 7"),
        ("a: &a [1]\nb: *a\n", "bundle_manifest.yaml:2: is no valid YAML: aliases are not supported, use `defaults`"),
        ("- 1\n", "bundle_manifest.yaml:1: should be a section of keys and values, got [1]"),
        ("version: 1\n", "bundle_manifest.yaml:1: entries: is required"),
        ("version: 1\nentries: {}\n", "bundle_manifest.yaml:2: entries: should be a list, got {}"),
        ("version: 1\nentries: []\n", "bundle_manifest.yaml:2: entries: should not be empty, got []"),
        ("version: 2\n" + VALID.removeprefix("version: 1\n"), "bundle_manifest.yaml:1: version: should be 1, got 2"),
        (VALID + "default: {}\n", 'bundle_manifest.yaml:17: default: unknown key; did you mean "defaults"?'),
        (VALID + "  - 7\n", "bundle_manifest.yaml:17: entry number 2: should be a section of keys and values, got 7"),
        (VALID + "  - target: {model: a/b}\n", "bundle_manifest.yaml:17: entry number 2: name: is required, "),
        (VALID + "  - {name: two}\n", 'bundle_manifest.yaml:17: entry "two": target: is required, and stands neither'),
        (
            VALID + "  - {name: ../two, target: {model: a/b}}\n",
            'bundle_manifest.yaml:17: entry "../two": name: "../two" should be 1 to 64 of a-z, 0-9, "." and "-", ',
        ),
        (
            VALID + "  - name: two\n    target:\n      model: 3\n",
            'bundle_manifest.yaml:19: entry "two": target.model: should be a text (quote it), got 3',
        ),
        (
            VALID + "  - target: {model: a/b}\n    name: one\n",
            'bundle_manifest.yaml:18: entry "one": name: "one" is the name of the entry on line 14 already; ',
        ),
    ],
)
def test_a_mistake_in_the_file_names_its_line(tmp_path: Path, text: str, error: str) -> None:
    (found,) = errors_of(tmp_path, text)
    assert found.startswith(error)


def test_a_missing_or_unreadable_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"nowhere\.yaml: there is no such file in "):
        Manifest.load(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ManifestError, match=r"latin\.yaml: cannot be read as UTF-8 text"):
        Manifest.load(tmp_path / "latin.yaml")


def test_all_mistakes_of_all_entries_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = VALID + (
        "    training: {num_epoch: 1, learning_rate: 0}\n"
        "  - name: one\n"
        "    target: {model: a/b, dtype: int4}\n"
        "    gates: {min_speedup: -1}\n"
        "    gates: {}\n"
        "surplus: 1\n"
    )
    assert [error.split(": ", 1)[0] for error in errors_of(tmp_path, text)] == [
        f"bundle_manifest.yaml:{line}" for line in (17, 17, 18, 19, 20, 21, 22)
    ]


def test_a_wrong_default_is_reported_once_at_its_own_line(tmp_path: Path) -> None:
    text = VALID.replace("learning_rate: 1e-4", "learning_rate: fast") + "  - {name: two, target: {model: a/b}}\n"
    assert errors_of(tmp_path, text) == [
        'bundle_manifest.yaml:7: defaults: training.learning_rate: should be a number, got "fast"'
    ]


def test_a_default_that_some_entries_replace_names_those_that_use_it(tmp_path: Path) -> None:
    text = VALID.replace("learning_rate: 1e-4", "learning_rate: fast") + "  - name: two\n    target: {model: a/b}\n"
    assert errors_of(tmp_path, text + "    training: {learning_rate: 1e-3}\n") == [
        'bundle_manifest.yaml:7: defaults, as used by entry "one": '
        'training.learning_rate: should be a number, got "fast"'
    ]


def test_a_default_at_odds_with_an_entry_names_both(tmp_path: Path) -> None:
    (error,) = errors_of(tmp_path, VALID + "    data: {sources: [{dataset: math.jsonl}]}\n")
    assert error.startswith(
        'bundle_manifest.yaml:12: defaults, as used by entry "one": benchmark.suites[0].source: '
        "the draft is trained on math.jsonl, split train; "
    )


@pytest.mark.parametrize(
    ("defaults", "error"),
    [
        ("3", "bundle_manifest.yaml:2: defaults: should be a section of keys and values"),
        ("{name: x}", "bundle_manifest.yaml:2: defaults: name: belongs to each entry"),
        ("{trainings: {}}", 'bundle_manifest.yaml:2: defaults: trainings: unknown key; did you mean "training"?'),
    ],
)
def test_defaults_hold_sections_only(tmp_path: Path, defaults: str, error: str) -> None:
    text = f"""\
version: 1
defaults: {defaults}
entries:
  - name: one
    target: {{model: a/b}}
    data: {{sources: [{{dataset: a.jsonl}}]}}
    benchmark: {{suites: [{{name: s, source: {{dataset: b.jsonl}}}}]}}
"""
    assert errors_of(tmp_path, text) == [error]


def test_the_error_survives_the_way_to_another_process(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as raised:
        Manifest.load(write(tmp_path, "version: 2\n"))
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_an_entrys_digest_follows_its_values_and_not_their_order(tmp_path: Path) -> None:
    (one,) = Manifest.load(write(tmp_path, VALID)).entries
    swapped = VALID.replace("  - name: one\n    target:\n      model: some/target\n", "")
    (same,) = Manifest.load(write(tmp_path, swapped + "  - target: {model: some/target}\n    name: one\n")).entries
    (other,) = Manifest.load(write(tmp_path, VALID.replace("1e-4", "2e-4"))).entries
    text = json.dumps(json.loads(one.model_dump_json()), sort_keys=True, separators=(",", ":"))
    assert one.digest() == hashlib.sha256(text.encode()).hexdigest()[:20] == same.digest()
    assert other.digest() != one.digest()


def test_gpus_that_serve_do_not_train(tmp_path: Path) -> None:
    gpus = "    resources: {num_gpus: 4}\n    features: {mode: live, serve_gpus: 1}\n"
    (entry,) = Manifest.load(write(tmp_path, VALID + gpus + "    training: {tokens_per_batch: 24576}\n")).entries
    assert entry.num_training_gpus == 3
    (entry,) = Manifest.load(write(tmp_path, VALID)).entries
    assert entry.num_training_gpus == 1


def test_gpus_that_share_micro_batches_need_fewer_of_them(tmp_path: Path) -> None:
    text = "    resources: {num_gpus: 4}\n    training: {tokens_per_batch: 16384, parallel: {cp: 2}}\n"
    (entry,) = Manifest.load(write(tmp_path, VALID + text)).entries
    assert entry.training.parallel.gpus_per_replica == 2


def test_models_made_in_code_are_checked_too() -> None:
    with pytest.raises(ValidationError, match="tokens_per_batch=8192"):
        TrainingConfig(tokens_per_micro_batch=16384)
    with pytest.raises(ValidationError, match="three different layers"):
        Eagle3Config(aux_layers=(5, 5, 6))
    with pytest.raises(ValidationError, match="extra"):
        ManifestEntry.model_validate({"nam": "x"})
