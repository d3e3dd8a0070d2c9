"""Features made while a training runs: a process over the target, which fills the spool that the trainer empties.

`python -m specforge_core.targets.live --spec SPEC --spool DIR --out DIR`, where SPEC is the trainer's own spec and DIR
holds what is wanted, as a `Request`. An item of the spool is a shard (`data/shards.py`) with the documents of one
micro-batch. In process each item is computed for itself: its bytes do not depend on where a producer went on.
"""

import argparse
import logging
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from specforge_core.data.shards import Document, FeatureIndex, FeatureWriter, load_index
from specforge_core.data.spool import PREFIX, Order, SpoolWriter
from specforge_core.facts import Record
from specforge_core.progress import progress
from specforge_core.scratch import remove_leftovers
from specforge_core.stages import USER_ERROR_STATUS, LiveSource, TrainSpec
from specforge_core.targets.capture import FeaturesOf, capture_request, served_features, supervised_documents
from specforge_core.targets.handover import Layout
from specforge_core.targets.hf import HFTarget

logger = logging.getLogger(__name__)

REQUEST_NAME = "request.json"
DYING_S = 3.0
"""What a trainer takes to let go of its lock that is told to end in the same moment."""
POLL_S = 0.05


class Request(Record):
    """What a trainer wants, in its order."""

    order: Order
    micro_batches: tuple[tuple[int, ...], ...]
    """By item: numbers of documents, counted over the `supervised_documents`."""


def load_documents(conversations: Path, max_tokens: int) -> list[Document]:
    """All that a training reads, to be picked from in any order; token ids as int32, 5 bytes a token in all."""
    documents = supervised_documents(conversations, max_tokens)
    return [document._replace(input_ids_T=document.input_ids_T.int()) for document in documents]


def produce(spec: TrainSpec, spool: Path, out: Path) -> None:
    """Make all that is wanted and neither there nor done with. Args: out: folder for what servers log."""
    live = spec.live
    assert live is not None
    assert spec.conversations is not None
    request = Request.model_validate_json((spool / REQUEST_NAME).read_text(encoding="utf-8"))
    index = load_index(spec.hidden_states).model_copy(update={"shards": ()})
    documents = load_documents(spec.conversations, spec.training.max_document_tokens)
    writer = SpoolWriter(spool, request.order, max_bytes=int(live.buffer_gib * 2**30))
    numbers = writer.to_make()
    if not numbers:
        return
    first = request.order.first
    items = [[documents[i] for i in request.micro_batches[number - first]] for number in numbers]
    item_tokens = [sum(len(document.input_ids_T) for document in item) for item in items]
    shards = FeatureWriter(spool, index)
    with (
        features_in_order(spec, live, index, items, out) as features_of,
        progress(desc="produce", total=sum(item_tokens), unit="token") as bar,
    ):
        place: Path | None = None
        for number, item, num_tokens in zip(numbers, items, item_tokens, strict=True):
            writer.wait_for_room(place)
            # By one number, so that all are written in one place; the item's own is its name in the spool.
            place = shards.fill(0, item, features_of(item)).partial
            writer.add(number, place, num_tokens=num_tokens)
            bar.update(num_tokens)
    # Without the target by now. Somebody has to be there to tidy up if the trainer dies.
    writer.wait_until_used()


@contextmanager
def features_in_order(
    spec: TrainSpec, live: LiveSource, index: FeatureIndex, items: Sequence[Sequence[Document]], out: Path
) -> Iterator[FeaturesOf]:
    """What gives the features of one item after the other."""
    if live.engine.name == "sglang":
        documents = [document for item in items for document in item]
        with served_features(
            spec.target,
            live.engine,
            Layout(index.layers, index.hidden_size, getattr(torch, spec.target.dtype)),
            documents,
            longest=max(len(document.input_ids_T) for document in documents),
            batch_tokens=live.batch_tokens,
            out=out,
        ) as features_of:
            yield features_of
        return
    target = HFTarget(spec.target, device=spec.device)
    yield lambda item: target.capture(map(capture_request, item), index.layers, batch_tokens=live.batch_tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 once everything was made, 2 for what a user must change first, 1 for all else."""
    parser = argparse.ArgumentParser(prog="python -m specforge_core.targets.live", description=__doc__)
    parser.add_argument("--spec", type=Path, required=True, help="JSON of the trainer's spec")
    parser.add_argument("--spool", type=Path, required=True, help="folder of the spool, with the request")
    parser.add_argument("--out", type=Path, required=True, help="folder for what servers log")
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
    )
    # Trainers end it so, and its folders in memory and its servers should go with it.
    signal.signal(signal.SIGTERM, _end)
    try:
        produce(TrainSpec.model_validate_json(args.spec.read_text(encoding="utf-8")), args.spool, args.out)
    except ValueError:
        traceback.print_exc()
        return USER_ERROR_STATUS
    except BaseException:
        # Told to end, or a line could not be printed for lack of a reader: where the trainer was killed it is either.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        remove_abandoned(args.spool)
        raise
    return 0


def _end(number: int, frame: object) -> None:
    # Each supervisor above asks once, which must not cut short what the first one set off.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


def remove_abandoned(spool: Path) -> None:
    """Remove a spool whose trainer was killed and cannot: gigabytes of memory. One that lives holds a lock."""
    deadline = time.monotonic() + DYING_S
    while spool.exists() and time.monotonic() < deadline:
        remove_leftovers(spool.parent, PREFIX)
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
