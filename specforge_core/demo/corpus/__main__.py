"""Write conversations to a file: python -m specforge_core.demo.corpus --split heldout --count 64 --out prompts.jsonl"""

import argparse
from pathlib import Path

from specforge_core.demo.corpus import FAMILIES, write_jsonl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("train", "heldout"), required=True)
    parser.add_argument("--family", choices=tuple(FAMILIES), help="default: all of them, mixed")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write_jsonl(args.out, args.split, count=args.count, seed=args.seed, family=args.family)


if __name__ == "__main__":
    main()
