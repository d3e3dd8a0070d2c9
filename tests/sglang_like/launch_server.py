"""The server program; see the package."""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.sglang_like import Behaviour
from tests.sglang_like.answers import Answer, Answers, ModelAnswers, ScriptedAnswers

logger = logging.getLogger("sglang_like")

VERSION = "0.5.14"
MARGIN = 6
"""Tokens of the context that a prompt may not take."""
SWITCHES = (
    "--skip-server-warmup --enable-metrics --trust-remote-code --disable-radix-cache --disable-cuda-graph "
    "--disable-overlap-schedule --enforce-disable-flashinfer-allreduce-fusion --skip-tokenizer-init "
    "--enable-deterministic-inference"
).split()
INTEGERS = (
    "--port --max-running-requests --max-total-tokens --cuda-graph-max-bs-decode --cuda-graph-max-bs "
    "--speculative-num-steps --speculative-eagle-topk --speculative-num-draft-tokens --chunked-prefill-size "
    "--max-prefill-tokens --context-length --random-seed --page-size --base-gpu-id --decode-log-interval"
).split()
TEXTS = (
    "--model-path --revision --host --dtype --attention-backend --sampling-backend --grammar-backend "
    "--mem-fraction-static --cuda-graph-backend-prefill --cuda-graph-backend-decode --speculative-algorithm "
    "--forward-hooks --log-level --served-model-name --load-format"
).split()


def parser(lacks: tuple[str, ...]) -> argparse.ArgumentParser:
    """The flags of SGLang that the factory knows, but those that this server lacks."""
    made = argparse.ArgumentParser(prog="launch_server.py", allow_abbrev=False)

    def add(*names: str, **settings: Any) -> None:
        if known := [name for name in names if name not in lacks]:
            made.add_argument(*known, dest=names[0].removeprefix("--").replace("-", "_"), **settings)

    # A flag named in the text about another one is not a flag that the server takes.
    add("--disable-cuda-graph-padding", action="store_true", help="Not with --enable-torch-compile.")
    for name in SWITCHES:
        add(name, action="store_true")
    for name in INTEGERS:
        add(name, type=int)
    for name in TEXTS:
        add(name)
    add("--tp-size", "--tensor-parallel-size", type=int, default=1)
    add("--speculative-draft-model-path", "--speculative-draft-model")
    return made


class Server(ThreadingHTTPServer):
    """The state that all requests share."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, args: argparse.Namespace, behaviour: Behaviour, answers: Answers) -> None:
        super().__init__((args.host or "127.0.0.1", args.port or 30000), Handler)
        self.args, self.behaviour, self.answers = args, behaviour, answers
        self.slots = threading.Semaphore(args.max_running_requests or 256)
        self.lock = threading.Lock()
        self.num_requests = self.num_running = self.peak_running = 0
        self.rids: set[str] = set()

    @property
    def is_speculative(self) -> bool:
        return getattr(self.args, "speculative_algorithm", None) is not None

    @property
    def is_deaf(self) -> bool:
        return self.behaviour.deaf_after is not None and self.num_requests > self.behaviour.deaf_after

    def note(self, **line: Any) -> None:
        """Add a line to the journal, if there is one."""
        if self.behaviour.journal:
            with self.lock, open(self.behaviour.journal, "a", encoding="utf-8") as journal:
                journal.write(json.dumps(line) + "\n")

    def info(self) -> dict[str, Any]:
        """What `/server_info` says."""
        state = {"num_requests": self.num_requests, "peak_running": self.peak_running}
        capacity = self.args.max_total_tokens or 2**20
        return {
            **vars(self.args),
            "version": VERSION,
            "pid": os.getpid(),
            "max_req_input_len": self.answers.context_length - MARGIN,
            "max_total_num_tokens": min(capacity, self.behaviour.max_capacity or capacity),
            "internal_states": [state],
        }

    def generate(self, rid: str, input_ids: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        """One answer as `/generate` gives it. Raises: ValueError for what SGLang refuses."""
        if not input_ids or not all(0 <= token_id < self.answers.vocab_size for token_id in input_ids):
            raise ValueError(f"input_ids must be tokens of a vocabulary of {self.answers.vocab_size}")
        if len(input_ids) >= self.answers.context_length:
            raise ValueError(
                f"The input ({len(input_ids)} tokens) is longer than the model's context length "
                f"({self.answers.context_length} tokens)."
            )
        num_tokens = len(input_ids) + sampling.get("max_new_tokens", 0)
        if num_tokens > self.answers.context_length:
            raise ValueError(
                f"Requested token count exceeds the model's maximum context length of {self.answers.context_length} "
                f"tokens. You requested a total of {num_tokens} tokens."
            )
        with self.lock:
            if rid in self.rids:
                raise ValueError(f"Duplicate request ID detected: {rid}")
            self.rids.add(rid)
        try:
            return self._generate(rid, input_ids, sampling)
        finally:
            with self.lock:
                self.rids.remove(rid)

    def _generate(self, rid: str, input_ids: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        started_at = time.monotonic()
        with self.slots:
            with self.lock:
                self.num_running += 1
                self.peak_running = max(self.peak_running, self.num_running)
            try:
                answer = self.answers.answer(rid, input_ids, sampling)
                num_steps = answer.num_verify_steps if self.is_speculative else len(answer.token_ids)
                time.sleep(self.behaviour.step_delay_s * num_steps)
            finally:
                with self.lock:
                    self.num_running -= 1
        meta_info = {
            "id": rid,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": len(input_ids),
            "completion_tokens": len(answer.token_ids),
            "cached_tokens": 0,
            "e2e_latency": time.monotonic() - started_at,
            **(self._draft_figures(answer) if self.is_speculative and not self.behaviour.hides_draft_figures else {}),
        }
        return {"text": "", "output_ids": answer.token_ids, "meta_info": meta_info}

    def _draft_figures(self, answer: Answer) -> dict[str, Any]:
        num_steps = answer.num_verify_steps
        if not num_steps:
            return {}
        num_correct = sum(accepted * count for accepted, count in enumerate(answer.histogram))
        num_proposed = num_steps * (self.args.speculative_num_draft_tokens - 1)
        return {
            "spec_verify_ct": num_steps,
            "spec_accept_length": len(answer.token_ids) / num_steps,
            "spec_accept_rate": num_correct / num_proposed,
            "spec_num_correct_drafts": num_correct,
            "spec_num_proposed_drafts": num_proposed,
            "spec_correct_drafts_histogram": answer.histogram,
        }


class Handler(BaseHTTPRequestHandler):
    """One connection, kept open between requests."""

    server: Server
    protocol_version = "HTTP/1.1"
    # Headers and body leave in two writes: without this the second waits 40 ms for an acknowledgement of the first.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send(self, status: int, body: Any) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.server.is_deaf:
            threading.Event().wait()
        if self.path in ("/health", "/health_generate"):
            self.send(200, "")
        elif self.path in ("/server_info", "/get_server_info"):
            self.send(200, self.server.info())
        else:
            self.send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.partition("?")[0] == "/flush_cache":
            self.server.note(event="flush", pid=os.getpid())
            self.send(200, "Cache flushed.\n")
        elif self.path == "/generate":
            self._generate(body)
        else:
            self.send(404, {"detail": "Not Found"})

    def _generate(self, body: bytes) -> None:
        server, behaviour = self.server, self.server.behaviour
        with server.lock:
            server.num_requests += 1
            number = server.num_requests
        if behaviour.die_after is not None and number > behaviour.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if server.is_deaf:
            threading.Event().wait()
        if behaviour.drop_every and number % behaviour.drop_every == 0:
            self.close_connection = True
            return
        if behaviour.fail_every and number % behaviour.fail_every == 0:
            self.send(500, {"error": {"message": "injected failure"}})
            return
        try:
            is_aborted = behaviour.abort_every is not None and number % behaviour.abort_every == 0
            answer = self._answer(json.loads(body), is_aborted=is_aborted)
        except ValueError as error:
            self.send(400, {"error": {"message": str(error)}})
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send(200, answer)

    def _answer(self, request: dict[str, Any], *, is_aborted: bool) -> Any:
        """One answer, or a list of them for a list of prompts."""
        if request.get("stream"):
            raise ValueError("this server does not stream")
        prompts, rids = request["input_ids"], request.get("rid")
        is_single = not prompts or isinstance(prompts[0], int)
        if is_single:
            prompts, rids = [prompts], [rids or uuid.uuid4().hex]
        rids = rids or [uuid.uuid4().hex for _ in prompts]
        sampling = request.get("sampling_params") or {}
        samplings = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        answers = []
        for rid, prompt, wanted in zip(rids, prompts, samplings, strict=True):
            answers.append(self.server.generate(rid, prompt, wanted))
            if is_aborted:
                answers[-1]["output_ids"] = answers[-1]["output_ids"][:1]
                answers[-1]["meta_info"]["finish_reason"] = {"type": "abort", "message": "Aborted", "status_code": None}
                continue
            self.server.note(event="answer", rid=rid, pid=os.getpid())
        return answers[0] if is_single else answers


def main() -> None:
    """Serve until killed."""
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s")
    behaviour = Behaviour.read(os.environ)
    args = parser(behaviour.lacks).parse_args()
    if behaviour.journal:
        with open(behaviour.journal, "a", encoding="utf-8") as journal:
            journal.write(json.dumps({"event": "start", "pid": os.getpid(), "argv": sys.argv[1:]}) + "\n")
    logger.info("server_args=%s", vars(args))
    if (args.port or 0) + 10_000 >= 2**16:
        raise ValueError(f"SGLANG_GRPC_PORT ({args.port + 10_000}) must be between 1 and 65535")
    if behaviour.exit_at_start is not None:
        logger.error(behaviour.exit_at_start)
        sys.exit(1)
    if behaviour.hang_at_start:
        logger.info("loading weights")
        threading.Event().wait()
    time.sleep(behaviour.start_delay_s)
    num_draft_steps = args.speculative_num_steps or 0 if getattr(args, "speculative_algorithm", None) else 0
    answers: Answers
    if behaviour.answers == "model":
        answers = ModelAnswers(args, num_draft_steps=num_draft_steps)
    else:
        answers = ScriptedAnswers(args.model_path, num_draft_steps=num_draft_steps)
    server = Server(args, behaviour, answers)
    logger.info("The server is fired up and ready to roll!")
    server.serve_forever()


if __name__ == "__main__":
    main()
