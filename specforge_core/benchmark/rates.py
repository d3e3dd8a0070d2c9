"""Measures what capture and regeneration get out of a server, against what the server can do, and writes a report.

    python -m specforge_core.benchmark.rates --target DIR --python SGLANG_PYTHON
    python -m specforge_core.benchmark.rates ... --only capture --lengths 1024 4096 real --repeats 5

All servers run on the first GPU at once, each with a bounded KV cache, so that a stage and its limit take turns; the
one that is not asked does nothing. Every comparison that is done is in the report at once.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import AutoConfig, PretrainedConfig

from specforge_core.arguments import add_report_options
from specforge_core.artifacts import write_result
from specforge_core.benchmark import server as server_module
from specforge_core.benchmark.rates_capture import HOOKS_FLAG, CaptureRates, make_work, write_rate
from specforge_core.benchmark.rates_regenerate import RegenerateRates, RegenerateWork
from specforge_core.benchmark.rates_results import Comparison, Pass, ServingRates, markdown, rates_table
from specforge_core.benchmark.server import Launch, SupervisedServer, gpu_groups, running_servers
from specforge_core.benchmark.server_flags import Options
from specforge_core.demo.inflated import inflated_target
from specforge_core.environment import environment, hardware_stem
from specforge_core.gpus import list_gpus, visible_devices
from specforge_core.manifest_sections import BUILTIN_DEMO, EngineConfig, FeatureDtype, FeaturesConfig, TargetConfig
from specforge_core.stages import ResolvedSource, ResolvedTarget

logger = logging.getLogger(__name__)

CAPTURE: Literal["capture"] = "capture"
REGENERATE: Literal["regenerate"] = "regenerate"
PLAIN = "prefill"
"""Names of the servers; the first two are those of the stages."""
NUM_WARM_UP_DOCUMENTS = 32
MEM_FRACTION_STATIC = 0.9
"""Of what is free when a server starts; what it takes of that, `--max-total-tokens` bounds."""
UNPINNED = "measured where it lies"

Servers = Mapping[str, SupervisedServer]


def main(argv: list[str] | None = None) -> int:
    """0. The report's table is printed."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="rates-") as scratch:
        rates = measure(arguments, Path(scratch))
    sys.stdout.write(rates_table(rates) + "\n")
    return 0


def measure(arguments: argparse.Namespace, scratch: Path) -> ServingRates:
    """The result, written after each comparison."""
    target = ResolvedTarget(model=str(arguments.target.absolute()), content_id=UNPINNED, dtype=arguments.dtype)
    config = AutoConfig.from_pretrained(target.model, trust_remote_code=False).get_text_config()
    engine = EngineConfig(max_running_requests=arguments.max_running_requests, mem_fraction_static=MEM_FRACTION_STATIC)
    rates = _begin(arguments, config, scratch)
    stem = arguments.name or hardware_stem(rates.environment)
    with ExitStack() as stack:
        capture = work = None
        if CAPTURE in arguments.only:
            capture = _capture_rates(arguments, target, config, scratch)
            stack.enter_context(capture.handover)
        if REGENERATE in arguments.only:
            work = RegenerateWork(target, _prompts(arguments), arguments.max_new_tokens, engine)
        launches = _launches(arguments, engine, capture, work)
        servers = stack.enter_context(_serving(launches, arguments.out / f"{stem}-servers"))
        rates = rates.model_copy(update={"servers": {name: server.record() for name, server in servers.items()}})
        for comparison in _comparisons(arguments, servers, capture, work, scratch):
            rates = rates.model_copy(update={"comparisons": (*rates.comparisons, comparison)})
            write_result(arguments.out, stem, rates, markdown(rates))
    return rates


def _begin(arguments: argparse.Namespace, config: PretrainedConfig, scratch: Path) -> ServingRates:
    """The result without comparisons."""
    gpu = next((gpu.name for gpu in list_gpus(None)), None)
    inflated = inflated_target(arguments.target)
    layers, width = config.num_hidden_layers, config.hidden_size
    return ServingRates(
        environment=environment(num_threads=torch.get_num_threads(), gpu=gpu, named_commit=arguments.commit),
        target=f"{arguments.target.name}, {layers} layers, {width:,} wide, {arguments.dtype}",
        note=inflated.note() if inflated else None,
        disk_bytes_per_s=write_rate(scratch) if CAPTURE in arguments.only else None,
    )


def _capture_rates(
    arguments: argparse.Namespace, target: ResolvedTarget, config: PretrainedConfig, scratch: Path
) -> CaptureRates:
    works = [
        make_work(
            lengths,
            arguments.share,
            num_tokens=arguments.tokens,
            vocab_size=config.vocab_size,
            directory=scratch / f"documents-{lengths}",
        )
        for lengths in arguments.lengths
    ]
    features = FeaturesConfig(dtype=arguments.features, tokens_per_shard=arguments.tokens_per_shard)
    return CaptureRates(target, config, works, features, scratch)


def _prompts(arguments: argparse.Namespace) -> ResolvedSource:
    dataset = arguments.prompts if arguments.prompts == BUILTIN_DEMO else str(Path(arguments.prompts).absolute())
    return ResolvedSource(dataset=dataset, limit=arguments.num_prompts, content_id=UNPINNED)


def _launches(
    arguments: argparse.Namespace, engine: EngineConfig, capture: CaptureRates | None, work: RegenerateWork | None
) -> dict[str, Launch]:
    """How each server is started."""

    def launch(options: Options, variables: Mapping[str, str] | None = None) -> Launch:
        module = server_module.SGLANG_MODULE
        return Launch(python=arguments.python, options=options, environment=variables or {}, module=module)

    launches: dict[str, Launch] = {}
    if capture:
        hooked = capture.options(engine)
        launches[CAPTURE] = launch(hooked, capture.handover.environment)
        launches[PLAIN] = launch({flag: value for flag, value in hooked.items() if flag != HOOKS_FLAG})
    if work:
        launches[REGENERATE] = launch(work.options())
    return launches


@contextmanager
def _serving(launches: Mapping[str, Launch], directory: Path) -> Iterator[Servers]:
    """The servers, all started at once, on the same GPU."""
    gpus = gpu_groups(visible_devices(), 1)[:1]
    waiting = {
        name: running_servers(launch, name=name, gpu_groups=gpus, directory=directory)
        for name, launch in launches.items()
    }
    with ExitStack() as stack:
        with ThreadPoolExecutor(len(waiting)) as pool:
            starts = {name: pool.submit(start.__enter__) for name, start in waiting.items()}
        for name, start in starts.items():
            if start.exception() is None:
                stack.push(waiting[name])
        yield {name: start.result()[0] for name, start in starts.items()}


def _comparisons(
    arguments: argparse.Namespace,
    servers: Servers,
    capture: CaptureRates | None,
    work: RegenerateWork | None,
    scratch: Path,
) -> Iterator[Comparison]:
    """One after the other, each after a warm-up of both sides."""
    if work:
        regenerate = RegenerateRates(work, servers[REGENERATE], scratch)
        regenerate.limit()
        limit, ours = take_turns(regenerate.limit, regenerate.ours, repeats=arguments.repeats)
        yield Comparison(stage=REGENERATE, work=work.name, limit=limit, ours=ours)
    for documents in capture.works if capture else ():
        assert capture is not None
        plain, hooked = partial(capture.limit, servers[PLAIN]), partial(capture.ours, servers[CAPTURE])
        warm_up = documents.first(NUM_WARM_UP_DOCUMENTS)
        plain(warm_up), hooked(warm_up)
        limit, ours = take_turns(partial(plain, documents), partial(hooked, documents), repeats=arguments.repeats)
        share = documents.supervised_share
        yield Comparison(stage=CAPTURE, work=documents.name, supervised_share=share, limit=limit, ours=ours)


def take_turns(
    limit: Callable[[], Pass], ours: Callable[[], Pass], *, repeats: int
) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """The passes of both, in pairs. Who is first changes from pair to pair, so that a drift favours nobody."""
    passes: dict[Callable[[], Pass], list[Pass]] = {limit: [], ours: []}
    for number in range(repeats):
        for side in (limit, ours) if number % 2 == 0 else (ours, limit):
            done = side()
            passes[side].append(done)
            name = "limit" if side is limit else "ours"
            logger.info("pass %d, %s: %.0f tokens/s (%.2f s)", number + 1, name, done.tokens_per_s, done.elapsed_s)
    return tuple(passes[limit]), tuple(passes[ours])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specforge_core.benchmark.rates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--target", type=Path, required=True, help="folder of the target")
    add("--python", default=sys.executable, help="interpreter of the environment that has SGLang; default: this one")
    add("--dtype", default="bfloat16", choices=get_args(TargetConfig.model_fields["dtype"].annotation))
    add("--only", nargs="+", choices=(CAPTURE, REGENERATE), default=[CAPTURE, REGENERATE])
    add("--repeats", type=int, default=3, help="pairs of passes, behind a warm-up")
    add("--max-running-requests", type=int, default=64)
    add("--lengths", nargs="+", default=["1024", "real"], help="of documents to capture: a number of tokens, or `real`")
    add("--share", type=float, default=0.5, help="of their tokens in answers")
    add("--tokens", type=int, default=196_608, help="of a pass of capture")
    add("--tokens-per-shard", type=int, default=2**14)
    add("--features", choices=get_args(FeatureDtype), default="bfloat16", help="what shards hold")
    add("--prompts", default=BUILTIN_DEMO, help="data set or file of the prompts to answer")
    add("--num-prompts", type=int, default=384)
    add("--max-new-tokens", type=int, default=256)
    add("--scratch", type=Path, help="where shards are written, on the disk that is to be measured; default: /tmp")
    add_report_options(parser, Path("reports/serving"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
