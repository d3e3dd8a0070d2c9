"""What a draft asks of the processes that work on its batch together. Without others, all of it is the identity."""

import torch
from torch import Tensor


class Peers:
    """A process on its own; `training/parallel.py` has the one among others.

    Shares: tokens in equal runs and passes are dealt out, and tokens' results gathered (context parallel).
    Parts: each process has some heads and features of the layer, whose sums are the layer's (tensor parallel).
    """

    share = 0
    """Which of the shares is this process's."""
    num_shares = 1
    part = 0
    """Which of the parts is this process's."""
    num_parts = 1

    def own(self, count: int) -> slice:
        """This process's share of so many tokens."""
        size = -(-count // self.num_shares)
        return slice(min(self.share * size, count), min((self.share + 1) * size, count))

    def gather(self, x_share: Tensor, count: int) -> Tensor:
        """[count, ...]: all shares' rows below each other, without gradient."""
        return x_share.detach()

    def sum_to_share(self, x: Tensor) -> Tensor:
        """The rows of `own(len(x))` of the sum of `x` over all shares."""
        return x

    def latest(self, x: Tensor) -> Tensor:
        """The maximum of `x` over all shares."""
        return x

    def spread(self, x: Tensor) -> Tensor:
        """`x`, which all parts read: backward adds up its gradients over them."""
        return x

    def collect(self, x: Tensor) -> Tensor:
        """The sum of `x` over all parts, each of which gets the sum's gradient."""
        return x

    def add_up_parts(self, x: Tensor) -> Tensor:
        """The sum of `x` over all parts, without gradient; in the place of `x`."""
        return x


def row_part(x: Tensor, peers: Peers) -> Tensor:
    """The rows of `x` that this part takes to the head, for which the rows of all parts are alike."""
    return x if peers.num_parts == 1 else x[peers.part :: peers.num_parts].contiguous()


def from_row_parts(parts: Tensor, like: Tensor, peers: Peers) -> Tensor:
    """The rows of all parts, like `like`, from the `row_part` of each."""
    if peers.num_parts == 1:
        return parts
    whole = torch.zeros_like(like)
    whole[peers.part :: peers.num_parts] = parts
    return peers.add_up_parts(whole)
