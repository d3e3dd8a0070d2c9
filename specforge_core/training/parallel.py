"""A draft on a mesh of dp x cp x tp processes, arranged from outside the model; tp neighbours stand next to each other.

dp  Replicas take micro-batches of their own. Nothing is said until the step ends (`sharding.py`).

cp  The processes of a replica take turns with the passes of each micro-batch, to and fro, so that all have equally many
    rows and keys to attend to, wherever in a long document the answers are. Tokens are dealt out in equal runs for what
    is computed once per token; hidden states, embedding halves and step-0 keys and values are gathered, and their
    gradients added up and scattered, once per micro-batch. Rows take positions, teacher and depth from the full
    sequence, so shifts know no borders, and no number of heads limits cp.
    Refused: the sequence cut in cp parts with all-to-all around attention (Ulysses, arXiv 2309.14509). It would move
    queries and outputs of all heads in each of the S steps, where keys and values of step 0, the only ones that other
    rows read, are gathered once; it would leave a process idle whose part of a document is its prompt; and it ends
    at the number of KV heads.

tp  The layer's heads and features are split, as in Megatron-LM (arXiv 1909.08053): q, k, v, gate and up by rows, o and
    down by columns, with one sum forward and one backward for each half of the layer and step. The head stays whole,
    and each process takes every tp-th row to it: rows are independent there, so nothing but the gradient of its input
    is exchanged. Splitting its vocabulary would need maximum and sum across processes in the middle of a fused kernel,
    for the draft and for its teacher. `fc` and norms are computed by all. So tp saves time on layer and head, but only
    the memory of the layer; a draft whose weights do not fit a GPU does not exist yet. Sums are in the dtype of
    computing: in bfloat16 no gradient of 24 random batches was off from float64 by more than 1.12 times what one
    process is (of 6 batches 1.20, with every product rounded in four parts as libraries may do it), and float32 would
    double what is sent, 10 D bytes for each row and step.

Gradients are sums over all processes that computed parts of them, in float32, whatever the mesh; the global count of
supervised tokens divides them once.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard

from specforge_core.drafts.base import DraftModel
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.drafts.peers import Peers
from specforge_core.kernels.precision import at_least_float32
from specforge_core.manifest_sections import TrainingConfig
from specforge_core.training.optim import muon_parameters
from specforge_core.training.sharding import Layout, Sharding, all_gather, reduce_scatter
from specforge_core.training.workers import Workers

TENSOR_PLAN = {
    "midlayer.self_attn.q_proj.weight": 0,
    "midlayer.self_attn.k_proj.weight": 0,
    "midlayer.self_attn.v_proj.weight": 0,
    "midlayer.self_attn.o_proj.weight": 1,
    "midlayer.mlp.gate_proj.weight": 0,
    "midlayer.mlp.up_proj.weight": 0,
    "midlayer.mlp.down_proj.weight": 1,
}
"""The dimension of each parameter that is split."""
BY_ROWS = "lm_head.weight"
"""Whole in each process, with a gradient that is the sum of what their rows give. All others are computed by all."""


def parallelize(draft: DraftModel, config: TrainingConfig, workers: Workers) -> Sharding:
    """What optimizers step in place of the draft's parameters. The draft lies on its device, the same everywhere.

    Raises: ValueError if tp does not fit the draft or the optimizer.
    """
    if workers.world_size == 1:
        return Sharding(draft)
    cp, tp = workers.cp, workers.tp
    device_type = workers.device.type
    mesh = init_device_mesh(device_type, (workers.num_replicas, cp, tp), mesh_dim_names=("dp", "cp", "tp"))
    everyone = DeviceMesh(device_type, torch.arange(workers.world_size), mesh_dim_names=("all",))
    layouts = {
        name: Layout(everyone, (), num_equal=1 if name == BY_ROWS else tp) for name, _ in draft.named_parameters()
    }
    if cp > 1 or tp > 1:
        # Another draft may not ask its peers for anything, and all of them would compute all of it.
        assert isinstance(draft, Eagle3Draft)
        draft.peers = ProcessPeers(mesh)
    if tp > 1:
        assert isinstance(draft, Eagle3Draft)
        check_splits(draft, config, tp)
        # Split first by tp, then by rows among those that hold the same part.
        ranks = torch.arange(workers.world_size).view(-1, tp).T
        split = DeviceMesh(device_type, ranks, mesh_dim_names=("tp", "data"))
        layouts |= {name: Layout(split, (Shard(dim),)) for name, dim in TENSOR_PLAN.items()}
        _split_layer(draft, workers.rank % tp, tp)
    return Sharding(draft, layouts, whole=muon_parameters(draft, config))


@torch.no_grad()
def reassemble(draft: DraftModel) -> None:
    """Every process has the whole draft for itself again, trained as it is. What optimizers step is void then."""
    peers = draft.peers
    if isinstance(peers, ProcessPeers) and peers.num_parts > 1:
        assert isinstance(draft, Eagle3Draft)
        for name, dim in TENSOR_PLAN.items():
            _replace(draft, name, peers.joined_parts(draft.get_parameter(name), dim))
        draft.shape = draft.shape._replace(
            num_heads=draft.shape.num_heads * peers.num_parts, num_kv_heads=draft.shape.num_kv_heads * peers.num_parts
        )
    draft.peers = Peers()


def check_splits(draft: Eagle3Draft, config: TrainingConfig, tp: int) -> None:
    """Nothing, if the draft's layer can be split over so many. Raises: ValueError if not."""
    sizes = {
        "KV heads": draft.shape.num_kv_heads,
        "features of the feed-forward": len(draft.midlayer.mlp.up_proj.weight),
    }
    for what, size in sizes.items():
        if size % tp:
            raise ValueError(f"the draft's {size} {what} cannot be split over training.parallel.tp={tp}; lower it")
    if config.optimizer == "muon":
        raise ValueError(
            f"training.optimizer=muon orthogonalises whole matrices, which training.parallel.tp={tp} splits; "
            "set tp to 1 or the optimizer to adamw"
        )


@torch.no_grad()
def _split_layer(draft: Eagle3Draft, part: int, num_parts: int) -> None:
    """Leave this process's part of the layer in the draft."""
    for name, dim in TENSOR_PLAN.items():
        _replace(draft, name, draft.get_parameter(name).chunk(num_parts, dim)[part].clone())
    draft.shape = draft.shape._replace(
        num_heads=draft.shape.num_heads // num_parts, num_kv_heads=draft.shape.num_kv_heads // num_parts
    )


def _replace(draft: DraftModel, name: str, value: Tensor) -> None:
    owner, _, field = name.rpartition(".")
    setattr(draft.get_submodule(owner), field, nn.Parameter(value))


class ProcessPeers(Peers):
    """The processes of one replica."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._context, self._tensor = mesh.get_group("cp"), mesh.get_group("tp")
        self.share, self.num_shares = mesh.get_local_rank("cp"), mesh["cp"].size()
        self.part, self.num_parts = mesh.get_local_rank("tp"), mesh["tp"].size()

    @torch.no_grad()
    def gather(self, x_share: Tensor, count: int) -> Tensor:
        if self.num_shares == 1:
            return x_share.detach()
        padded = _with_rows(x_share.detach(), -(-count // self.num_shares))
        whole = padded.new_empty(len(padded) * self.num_shares, *padded.shape[1:])
        all_gather(whole, padded, group=self._context)
        return whole[:count]

    @torch.no_grad()
    def sum_to_share(self, x: Tensor) -> Tensor:
        if self.num_shares == 1:
            return x
        size = -(-len(x) // self.num_shares)
        padded = _with_rows(at_least_float32(x), size * self.num_shares)
        total = padded.new_empty(size, *padded.shape[1:])
        reduce_scatter(total, padded, group=self._context)
        own = self.own(len(x))
        return total[: own.stop - own.start].to(x.dtype)

    def latest(self, x: Tensor) -> Tensor:
        if self.num_shares > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self._context)
        return x

    def spread(self, x: Tensor) -> Tensor:
        return x if self.num_parts == 1 else _Spread.apply(x, self)

    def collect(self, x: Tensor) -> Tensor:
        return x if self.num_parts == 1 else _Collect.apply(x, self)

    def add_up_parts(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self._tensor)
        return x

    def joined_parts(self, x: Tensor, dim: int) -> Tensor:
        """The tensors of all parts along `dim`."""
        parts = [torch.empty_like(x) for _ in range(self.num_parts)]
        dist.all_gather(parts, x.contiguous(), group=self._tensor)
        return torch.cat(parts, dim)


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Another branch may read the gradient that came in.
        return ctx.peers.add_up_parts(grads[0].clone(memory_format=torch.contiguous_format)), None


class _Collect(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        return peers.add_up_parts(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _with_rows(x: Tensor, num_rows: int) -> Tensor:
    """`x` with rows of zeros behind its own, so many in all."""
    return F.pad(x, (*(0, 0) * (x.dim() - 1), 0, num_rows - len(x))).contiguous()
