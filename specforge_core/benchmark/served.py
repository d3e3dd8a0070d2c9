"""The benchmark stage on SGLang servers: one for the target alone, and one for each way to draft.

Their arguments are the same but for the draft's own. Both get a KV cache that holds the widest load, so none waits for
room, and as each takes no more than that, two of them share a GPU: their rounds alternate. Where they do not fit, all
rounds without draft come first (`engine.colocate: false`), and a machine that gets slower meanwhile shows.

A sweep is measured like a suite, at each of its points, on the prompts of all suites in turns; each of its
SWEEP_ROUNDS rounds answers `requests_per_slot` requests for each of the point's slots.

Whatever needs the target in this process (near-ties, the acceptance of the reference loop) waits until the servers have
ended, because it needs their memory.
"""

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from specforge_core.artifacts import METRICS_NAME
from specforge_core.benchmark import server as server_module
from specforge_core.benchmark.in_process import made_on
from specforge_core.benchmark.load import ServedModel, served_side
from specforge_core.benchmark.measure import (
    UNTIMED_BATCH_SIZE,
    Decode,
    Rounds,
    Run,
    Workload,
    first_answers,
    summarise,
    sums_with_draft,
    timed_runs,
)
from specforge_core.benchmark.recording import REQUESTS_NAME, Recorder, announce, recording, write_result
from specforge_core.benchmark.references import MeasuredSuite, with_references
from specforge_core.benchmark.server import Launch, Server, SupervisedServer, gpu_groups, running_servers, server_info
from specforge_core.benchmark.server_flags import Options, draft_options, target_options
from specforge_core.benchmark.suites import Interlocutor, longest_request, suite_workloads
from specforge_core.benchmark.sweep import SWEEP_ROUNDS, sweep_servings
from specforge_core.decoding.speculative import check_rewindable
from specforge_core.facts import BenchmarkResult, ServerRecord, SweepPoint
from specforge_core.gpus import visible_devices
from specforge_core.manifest_sections import ServingConfig
from specforge_core.stages import BenchmarkSpec
from specforge_core.targets import Completion, GenerationRequest, Sampling
from specforge_core.targets.sglang import SGLangTarget

logger = logging.getLogger(__name__)

BASELINE = "baseline"
SWEEP = "all_suites"
"""Stands where a suite's name does, and cannot be one."""
RESERVED_TOKENS = 8
"""A server refuses a prompt that comes so near to the context limit."""


def measure_served(spec: BenchmarkSpec, out: Path) -> BenchmarkResult:
    """The result of the stage. It starts its servers itself: they must differ in nothing but the draft.

    Raises: ValueError for an unusable suite, arguments that the server does not know, a request that it refuses, or a
    draft that takes no part; ServerLost, RuntimeError if servers keep dying.
    """
    if spec.engine.urls:
        raise ValueError(
            f"engine.urls={list(spec.engine.urls)}: the benchmark compares servers that differ in the draft alone, so "
            "it starts its own; leave the URLs out"
        )
    bench = _Bench(spec, out)
    if spec.benchmark.num_in_process_prompts:
        # Known before hours of measurements.
        check_rewindable(bench.target.config)
    (out / METRICS_NAME).unlink(missing_ok=True)
    with recording(out / REQUESTS_NAME, bench.target.tokenizer) as record:
        bench.measure(record)
    in_order = [(suite.name, serving) for suite in spec.benchmark.suites for serving in spec.benchmark.serving]
    measured = sorted(bench.suites, key=lambda one: in_order.index((one.workload.suite, one.workload.serving)))
    result = BenchmarkResult(
        measurements=with_references(spec, measured),
        environment=made_on(spec.device, num_threads=torch.get_num_threads()),
        engine=spec.engine.name,
        sweep=tuple(bench.points),
        servers=bench.records,
    )
    write_result(result, out)
    return result


class _Bench:
    """The servers of the stage, and what is asked of them."""

    def __init__(self, spec: BenchmarkSpec, out: Path) -> None:
        self.spec, self.out = spec, out
        self.target = SGLangTarget(spec.target, ())
        self.context_length: int = self.target.config.max_position_embeddings - RESERVED_TOKENS
        self.max_total_tokens = self._max_total_tokens()
        self.suites: list[MeasuredSuite] = []
        self.points: list[SweepPoint] = []
        self.records: dict[str, ServerRecord] = {}

    def _max_total_tokens(self) -> int:
        """Tokens of the KV cache that the widest load needs at most."""
        benchmark, sweep = self.spec.benchmark, self.spec.benchmark.sweep
        servings = benchmark.serving + (sweep_servings(sweep) if sweep else ())
        longest = 0
        for suite in benchmark.suites:
            more = max(0, sweep.max_new_tokens - suite.max_new_tokens) if sweep else 0
            longest = max(longest, longest_request(suite, self.target.tokenizer, self.context_length) + more)
        # Two steps are prepared at once, and a tree is drafted whole before its best part is verified.
        drafted = max(2 * max(one.num_steps * one.topk, one.num_draft_tokens) for one in servings)
        width = max(UNTIMED_BATCH_SIZE, *(one.concurrency for one in servings))
        return width * (longest + drafted + RESERVED_TOKENS)

    def measure(self, record: Recorder) -> None:
        """Measure everything, in the order of the drafts: each server is started once."""
        with contextlib.ExitStack() as while_baseline_runs:
            baseline = while_baseline_runs.enter_context(self._serve(None))
            without_draft = self._side(baseline, None)
            workloads = self._workloads(baseline)
            earlier: dict[tuple[str, int], list[Run]] = {}
            if not self.spec.engine.colocate:
                for workload in workloads:
                    # Without draft all chains are alike.
                    if (key := _load_of(workload)) not in earlier:
                        (earlier[key],) = timed_runs(workload, [without_draft])
                while_baseline_runs.close()
            for chain in dict.fromkeys(workload.serving.chain() for workload in workloads):
                of_chain = [workload for workload in workloads if workload.serving.chain() == chain]
                with self._serve(of_chain[0].serving) as drafting:
                    with_draft = self._side(drafting, of_chain[0].serving)
                    for workload in of_chain:
                        if earlier:
                            rounds = Rounds(earlier[_load_of(workload)], *timed_runs(workload, [with_draft]))
                        else:
                            rounds = Rounds(*timed_runs(workload, [without_draft, with_draft]))
                        self._finish(workload, rounds, record)

    @contextlib.contextmanager
    def _serve(self, serving: ServingConfig | None) -> Iterator[SupervisedServer]:
        """A server with this draft, or without; on one group of GPUs, for figures of one server are asked for."""
        engine, name = self.spec.engine, serving.chain() if serving else BASELINE
        options: Options = {
            **target_options(self.spec.target, engine),
            "--max-total-tokens": self.max_total_tokens,
            **(draft_options(self.spec.draft, serving) if serving else {}),
        }
        launch = Launch(python=engine.python, options=options, module=server_module.SGLANG_MODULE)
        groups = gpu_groups(visible_devices(), engine.tensor_parallel)[:1]
        with running_servers(launch, name=name, gpu_groups=groups, directory=self.out) as (server,):
            self._check_capacity(server, name)
            try:
                yield server
            finally:
                self.records[name] = server.record()

    def _check_capacity(self, server: Server, name: str) -> None:
        """Warn if the server has less room than the widest load may need: then requests wait, on this side alone."""
        capacity = server_info(server.url).get("max_total_num_tokens")
        if capacity is not None and capacity < self.max_total_tokens:
            logger.warning(
                "server %s has room for %d tokens and the widest load may need %d: at that load requests may wait for "
                "each other; lower the concurrency or max_new_tokens, raise engine.mem_fraction_static, or set "
                "engine.colocate: false",
                name,
                capacity,
                self.max_total_tokens,
            )

    def _side(self, server: Server, serving: ServingConfig | None) -> Decode:
        model = ServedModel(self.target.eos_token_ids, self.context_length, serving.num_steps if serving else 0)
        return served_side(server, model)

    def _workloads(self, baseline: Server) -> list[Workload]:
        """Those of the suites, then those of the sweep. Earlier turns of their prompts are had with the baseline."""
        target = SGLangTarget(self.spec.target, (baseline,))

        def answer(requests: Sequence[GenerationRequest], sampling: Sampling) -> Iterator[Completion]:
            for completion in target.generate(requests, sampling, batch_size=UNTIMED_BATCH_SIZE):
                if not isinstance(completion, Completion):
                    raise ValueError(f"an earlier turn of a suite is not answered: {completion.reason}")
                yield completion

        interlocutor = Interlocutor(target.tokenizer, self.context_length, answer)
        workloads = suite_workloads(self.spec.benchmark, interlocutor)
        requests = {workload.suite: workload.requests for workload in workloads}
        return workloads + sweep_workloads(self.spec, list(requests.values()))

    def _finish(self, workload: Workload, rounds: Rounds, record: Recorder) -> None:
        """Keep every answer, and what follows from them."""
        for drafter, runs in ((None, rounds.baseline), ("draft", rounds.speculative)):
            for number, run in enumerate(runs):
                for id, generation in run.generations.items():
                    record(workload, drafter, generation, round=number, **run.timings[id]._asdict())
        if workload.suite == SWEEP:
            self.points.append(sweep_point(workload, rounds))
            announce(self.points[-1], workload, self.out)
        else:
            self.suites.append(MeasuredSuite(workload, rounds, summarise(workload, rounds, self.target.tokenizer)))
            announce(self.suites[-1].figures, workload, self.out)


def _load_of(workload: Workload) -> tuple[str, int]:
    """What a server without draft can tell apart."""
    return workload.suite, workload.serving.concurrency


def sweep_workloads(spec: BenchmarkSpec, suites: Sequence[Sequence[GenerationRequest]]) -> list[Workload]:
    """One for each point: the prompts of all suites in turns, from the front again where they run out."""
    sweep = spec.benchmark.sweep
    if sweep is None:
        return []
    in_turns = [request for row in itertools.zip_longest(*suites) for request in row if request is not None]
    workloads = []
    for serving in sweep_servings(sweep):
        num_requests = SWEEP_ROUNDS * sweep.requests_per_slot * serving.concurrency
        taken = itertools.islice(itertools.cycle(in_turns), num_requests)
        workloads.append(
            Workload(
                suite=SWEEP,
                # Names of their own: a server refuses a request with the name of one that it still works on.
                requests=[request._replace(id=f"{request.id}/{number}") for number, request in enumerate(taken)],
                sampling=Sampling(sweep.max_new_tokens, spec.benchmark.temperature, seed=spec.benchmark.seed),
                serving=serving,
                repeats=SWEEP_ROUNDS,
            )
        )
    return workloads


def sweep_point(workload: Workload, rounds: Rounds) -> SweepPoint:
    """The point of a sweep's workload. Raises: ValueError if every answer is a single token."""
    speculative = first_answers(rounds.speculative)
    sums = sums_with_draft(workload, speculative)
    return SweepPoint(
        serving=workload.serving,
        num_requests=len(speculative),
        num_output_tokens=sums.num_output_tokens,
        num_verify_steps=sums.num_verify_steps,
        baseline_output_tokens_per_s=tuple(run.output_tokens_per_s for run in rounds.baseline),
        output_tokens_per_s=tuple(run.output_tokens_per_s for run in rounds.speculative),
    )
