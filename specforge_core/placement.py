"""Which of an entry's GPUs serve and which train, where features are made while a training runs. Torch-free."""

from typing import NamedTuple


class Placement(NamedTuple):
    """GPUs of one entry, and how fast target and training go together."""

    serve_gpus: int
    train_gpus: int
    produced_tokens_per_s: float
    """What the target could make."""
    consumed_tokens_per_s: float
    """What the training could take."""

    @property
    def tokens_per_s(self) -> float:
        """Of both: the faster one waits for the slower one."""
        return min(self.produced_tokens_per_s, self.consumed_tokens_per_s)

    @property
    def idle_share(self) -> float:
        """Share of the time of these GPUs in which they wait for the others."""
        idle_gpus = self.serve_gpus * (1 - self.tokens_per_s / self.produced_tokens_per_s) + self.train_gpus * (
            1 - self.tokens_per_s / self.consumed_tokens_per_s
        )
        return idle_gpus / (self.serve_gpus + self.train_gpus)


def propose_split(
    num_gpus: int,
    produce_tokens_per_s_per_gpu: float,
    train_tokens_per_s_per_gpu: float,
    *,
    gpus_per_server: int = 1,
    gpus_per_replica: int = 1,
) -> Placement:
    """The fastest placement; of equally fast ones that with the fewest GPUs that serve, for more memory to train in.

    Args: rates: measured, each on its own; gpus_per_server: tensor parallelism of the target; gpus_per_replica: cp x tp
    of the training.
    Raises: ValueError if there is not one server and one replica in them, or a rate is not positive.
    """
    if produce_tokens_per_s_per_gpu <= 0 or train_tokens_per_s_per_gpu <= 0:
        raise ValueError(
            f"rates of {produce_tokens_per_s_per_gpu} and {train_tokens_per_s_per_gpu} tokens/s should be positive; "
            "measure them again"
        )
    placements = [
        Placement(
            serve_gpus,
            train_gpus,
            serve_gpus * produce_tokens_per_s_per_gpu,
            train_gpus * train_tokens_per_s_per_gpu,
        )
        for serve_gpus in range(gpus_per_server, num_gpus, gpus_per_server)
        if (train_gpus := (num_gpus - serve_gpus) // gpus_per_replica * gpus_per_replica)
    ]
    if not placements:
        raise ValueError(
            f"{num_gpus} GPUs are too few for a server of {gpus_per_server} and a replica of {gpus_per_replica} that "
            "trains beside it; raise resources.num_gpus, or store the features"
        )
    return max(placements, key=lambda placement: (placement.tokens_per_s, -placement.serve_gpus))
