"""Serves a local Hub until Ctrl-C."""

import argparse
import contextlib
from pathlib import Path

from tests.hub_like.api import Account
from tests.hub_like.server import TOKEN, Hub


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub_like", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of what it holds; a restart finds it again")
    parser.add_argument("--port", type=int, default=8900)
    parser.add_argument("--organizations", nargs="*", default=["specbundle"], help="that may be written to")
    args = parser.parse_args()
    account = Account(organizations=dict.fromkeys(args.organizations, "admin"))
    hub = Hub(args.root, port=args.port, accounts={TOKEN: account})
    print(f"{hub.url} serves {args.root}; use it with", flush=True)  # noqa: T201
    print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)  # noqa: T201
    with contextlib.suppress(KeyboardInterrupt):
        hub.serve_forever()


if __name__ == "__main__":
    main()
