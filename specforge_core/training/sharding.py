"""Who steps which rows of which weight, and the sums that this takes: one reduction and one gathering per step.

A draft is one layer that every pass reads as a whole, many times. So each process keeps the float32 weights whole, and
gradients add up whole in float32 over all micro-batches without a word to the others. Then each matrix is reduced to
the rows that a process answers for, which holds their optimizer state alone; stepped, the rows go to the others.
Vectors, and matrices whose optimizer wants them whole or whose rows do not divide, are added up and stepped everywhere.

Bytes for P weights on N processes, beside activations: 4 P weights + 4 P gradients + 2 P copies in bfloat16 + 8 P / N
moments of AdamW. For the draft of a 70B target (width 8,192, P = 1.4e9) that is 20 GB at N = 2. Traffic is that of one
all-reduce in float32 a step.

Refused: FSDP2, whose hooks reduce what autograd leaves in `.grad`, while our passes add float32 products to it by hand,
and which would need its private accumulators for that (`bench/fsdp2.py` measures it with autograd); and float32 weights
in shards too (gathered in bfloat16), which saves 4 P (1 - 1 / N), 3 GB above, for parameters with gradients of another
dtype and a `state_dict` that is no draft's.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.optim import Optimizer

from specforge_core.drafts.linear import gradient_buffer

# torch 2.13 renames both, and warns of the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Layout(NamedTuple):
    """Where a parameter lies: the processes that add up its gradient, and what tells them apart."""

    mesh: DeviceMesh
    """Its last dimension is the processes that hold the same part of the parameter, before it is sharded."""
    placements: tuple[Placement, ...]
    """Of the dimensions before, by tensor parallelism."""
    num_equal: int = 1
    """So many of these processes computed one and the same gradient, of which a sum has too much."""


class Piece(NamedTuple):
    """One parameter and the part of it that this process steps."""

    name: str
    parameter: nn.Parameter
    """Whole, but for tensor parallelism."""
    shard: nn.Parameter
    """Rows of it, in its memory; all of them if it is not sharded."""
    layout: Layout | None
    """None if there is no other process."""
    is_sharded: bool

    @property
    def group(self) -> dist.ProcessGroup:
        assert self.layout is not None
        return self.layout.mesh.get_group(self.layout.mesh.ndim - 1)

    @property
    def num_copies(self) -> int:
        """Processes that hold this very part."""
        return 1 if self.layout is None or self.is_sharded else self.layout.mesh.size(-1)


class Sharding:
    """What optimizers step in place of a draft's parameters, and how gradients and weights get there and back."""

    def __init__(self, draft: nn.Module, layouts: dict[str, Layout] | None = None, whole: Collection[str] = ()) -> None:
        """Args: layouts: by parameter; None in a process on its own. whole: parameters not to be sharded."""
        self.pieces = tuple(
            _make_piece(name, parameter, None if layouts is None else layouts[name], name in whole)
            for name, parameter in draft.named_parameters()
        )
        self._is_alone = layouts is None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What optimizers step, under the names of the parameters that they are parts of."""
        return ((piece.name, piece.shard) for piece in self.pieces)

    def zero_gradients(self) -> None:
        """All gradients to zero, in the memory that they had."""
        for piece in self.pieces:
            gradient_buffer(piece.parameter).zero_()

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Replace the gradient of what this process steps by its sum over all processes; that of the rest is void."""
        pending = []
        for piece in self.pieces:
            gradient, mine = gradient_buffer(piece.parameter), self._gradient(piece)
            if piece.layout is not None and piece.is_sharded:
                pending.append(reduce_scatter(mine, gradient, group=piece.group, async_op=True))
            elif piece.layout is not None:
                pending.append(dist.all_reduce(gradient, group=piece.group, async_op=True))
        for work in pending:
            work.wait()
        for piece in self.pieces:
            mine = self._gradient(piece)
            if piece.layout is not None and piece.layout.num_equal > 1:
                mine /= piece.layout.num_equal
            piece.shard.grad = mine

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The norm of the whole reduced gradient, float64 []."""
        gradients = [self._gradient(piece) for piece in self.pieces]
        # What several processes hold counts once, in parts that add up.
        shares = [piece.num_copies**-0.5 for piece in self.pieces]
        total = torch.stack(torch._foreach_mul(torch._foreach_norm(gradients), shares)).double().square().sum()
        if not self._is_alone:
            dist.all_reduce(total)
        return total.sqrt()

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """Bring the stepped rows to the processes that hold the others."""
        pending = [
            all_gather(piece.parameter.data, piece.shard.data, group=piece.group, async_op=True)
            for piece in self.pieces
            if piece.is_sharded
        ]
        for work in pending:
            work.wait()

    def state(self, optimizers: Sequence[Optimizer]) -> dict[str, dict[str, Any]]:
        """All that a training changes, for torch.distributed.checkpoint: weights, and the state of their optimizers.

        The tensors share memory with what is trained: to go on from a checkpoint, load it into them in place, and call
        `gather_parameters`. Any number of processes loads what another one saved.
        """
        for optimizer in optimizers:
            _begin(optimizer)
        of_optimizers = {
            piece.name: {
                field: as_dtensor(piece, value) if value.shape == piece.shard.shape else value
                for field, value in optimizer.state[piece.shard].items()
            }
            for piece in self.pieces
            for optimizer in optimizers
            if piece.shard in optimizer.state
        }
        return {"draft": {piece.name: as_dtensor(piece, piece.shard) for piece in self.pieces}, "state": of_optimizers}

    @staticmethod
    def _gradient(piece: Piece) -> Tensor:
        """That of what this process steps."""
        gradient = gradient_buffer(piece.parameter)
        return gradient[_own_rows(piece.layout, len(gradient))] if piece.is_sharded else gradient


def as_dtensor(piece: Piece, local: Tensor) -> Tensor:
    """`local`, shaped like what this process steps, as its part of the global tensor; itself without others."""
    if piece.layout is None:
        return local.detach()
    last: Placement = Shard(0) if piece.is_sharded else Replicate()
    # The same memory as a tensor that begins where it does: torch 2.13 cannot copy a DTensor of rows behind the first.
    local = torch.from_dlpack(local.detach())
    return DTensor.from_local(local, piece.layout.mesh, (*piece.layout.placements, last), run_check=False)


def _begin(optimizer: Optimizer) -> None:
    """Have the optimizer make the state that its first step would, so that there is something to load into."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if optimizer.state or not parameters:
        return
    rates, gradients = [group["lr"] for group in optimizer.param_groups], [p.grad for p in parameters]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for fields in optimizer.state.values():
        if "step" in fields:
            fields["step"].zero_()


def _make_piece(name: str, parameter: nn.Parameter, layout: Layout | None, is_whole: bool) -> Piece:
    if layout is None:
        return Piece(name, parameter, parameter, None, is_sharded=False)
    num_shards = layout.mesh.size(-1)
    is_sharded = num_shards > 1 and not is_whole and parameter.dim() == 2 and len(parameter) % num_shards == 0
    if not is_sharded:
        return Piece(name, parameter, parameter, layout, is_sharded)
    shard = nn.Parameter(parameter.detach()[_own_rows(layout, len(parameter))])
    return Piece(name, parameter, shard, layout, is_sharded)


def _own_rows(layout: Layout | None, num_rows: int) -> slice:
    assert layout is not None
    share = num_rows // layout.mesh.size(-1)
    first = layout.mesh.get_local_rank(layout.mesh.ndim - 1) * share
    return slice(first, first + share)
