"""A server of the target on GPUs: what fits, and how fast it reads and writes. Torch-free."""

from typing import NamedTuple

from specforge_core.cost.hardware import GPUS_PER_HOST, NETWORK_BYTES_PER_S, Hardware
from specforge_core.cost.rates import Line, Rates, fit_line
from specforge_core.cost.target_model import TargetModel

ACTIVATION_BYTES = 2
REDUCTIONS_PER_LAYER = 2
"""Behind attention, and behind the feed-forward network."""
REDUCTION_LATENCY_S = 10e-6
"""Of a small one over NVLink: an assumption, not measured here."""
NETWORK_LATENCY_S = 30e-6
"""The same between hosts."""


class Answer(NamedTuple):
    """Tokens of one, or on average."""

    prompt_tokens: float
    """That are not in the server's cache."""
    num_tokens: float
    num_keys: float
    """That a token of it attends to."""


class ServerShape(NamedTuple):
    """One server: its model on the GPUs that share it."""

    model: TargetModel
    hardware: Hardware
    tensor_parallel: int

    @property
    def weight_bytes_per_gpu(self) -> float:
        """Divided evenly."""
        return self.model.weight_bytes / self.tensor_parallel

    @property
    def spans_hosts(self) -> bool:
        """Whether its GPUs are not all in one host."""
        return self.tensor_parallel > GPUS_PER_HOST

    def kv_tokens(self, mem_fraction: float) -> float:
        """Tokens that the KV cache holds; negative if the weights alone are too large."""
        room = mem_fraction * self.hardware.memory_bytes - self.weight_bytes_per_gpu
        return room / self.model.kv_bytes_per_gpu(self.tensor_parallel)

    def capture_s(self, rates: Rates, num_tokens: float, num_keys: float, head_share: float) -> float:
        """Seconds of a request of capture, on one server with others in flight."""
        flops = num_tokens * self.model.prefill_flops(num_keys, head_share) / self.tensor_parallel
        speed = self.hardware.bf16_flops / rates.hardware.bf16_flops
        return fit_line(rates.captures).seconds(flops, speed) + num_tokens * self._reduced_s_per_token()

    def answer_s(self, rates: Rates, num_requests: int, answer: Answer) -> float:
        """Seconds of the server for each of the answers that it writes, `num_requests` of them at once.

        An answer takes its share of the steps that add a token to each of them, and its prompt is read while the others
        wait.
        """
        read = self.model.decode_bytes(num_requests, 0) / self.tensor_parallel
        read += num_requests * answer.num_keys * self.model.kv_bytes_per_gpu(self.tensor_parallel)
        num_steps = answer.num_tokens / num_requests
        speed = self.hardware.memory_bytes_per_s / rates.hardware.memory_bytes_per_s
        # Not part of the measured overhead, which is that of one GPU.
        latency = NETWORK_LATENCY_S if self.spans_hosts else REDUCTION_LATENCY_S
        waiting = REDUCTIONS_PER_LAYER * self.model.num_layers * latency if self.tensor_parallel > 1 else 0.0
        return (
            fit_line(rates.answers).seconds(num_steps * read, speed)
            + num_steps * waiting
            + self._prompt_s(rates, answer.prompt_tokens)
            + (answer.prompt_tokens + answer.num_tokens) * self._reduced_s_per_token()
        )

    def _prompt_s(self, rates: Rates, num_tokens: float) -> float:
        """Of its FLOPs; what a prompt takes however short it is, is in the overhead of an answer."""
        flops = num_tokens * self.model.prefill_flops(num_tokens / 2, head_share=0.0) / self.tensor_parallel
        speed = self.hardware.bf16_flops / rates.hardware.bf16_flops
        return Line(fit_line(rates.captures).s_per_unit, 0.0).seconds(flops, speed)

    def _reduced_s_per_token(self) -> float:
        """Of the sums over the server's GPUs, each of which sends and receives 2 (n - 1) / n of them."""
        sent = 2 * (self.tensor_parallel - 1) / self.tensor_parallel * self.model.width * ACTIVATION_BYTES
        link = NETWORK_BYTES_PER_S if self.spans_hosts else self.hardware.link_bytes_per_s
        return REDUCTIONS_PER_LAYER * self.model.num_layers * sent / link
