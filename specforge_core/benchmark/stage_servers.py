"""The servers of a stage, from what its spec says about them."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from specforge_core.benchmark import server
from specforge_core.benchmark.server import AttachedServer, Launch, Server, gpu_groups, running_servers, server_info
from specforge_core.benchmark.server_flags import Options
from specforge_core.gpus import visible_devices
from specforge_core.stages import ServedEngine

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def stage_servers(
    engine: ServedEngine,
    options: Options,
    *,
    name: str,
    directory: Path,
    environment: Mapping[str, str] | None = None,
    allow_urls: bool = True,
) -> Iterator[tuple[Server, ...]]:
    """Ready servers with these options: those at `engine.urls`, else one of the stage's own for each group of GPUs.

    Args: name, directory: as of `running_servers`; environment: variables of its own servers; allow_urls: False where a
    stage cannot work with servers that others started.
    Raises: ValueError for options that the server does not know, or a URL that does not serve this model or may not be
    given; ServerLost if a server does not start or answer.
    """
    if engine.urls and not allow_urls:
        raise ValueError(
            f"engine.urls={list(engine.urls)}: this stage needs options that only servers of its own have; "
            "leave the URLs out"
        )
    if engine.urls:
        attached = tuple(AttachedServer(url) for url in engine.urls)
        for one in attached:
            _check_model(one.ensure_alive(), options)
        yield attached
        return
    launch = Launch(python=engine.python, options=options, environment=environment or {}, module=server.SGLANG_MODULE)
    groups = gpu_groups(visible_devices(), engine.tensor_parallel)
    with running_servers(launch, name=name, gpu_groups=groups, directory=directory) as servers:
        yield servers


def _check_model(url: str, options: Options) -> None:
    """Nothing, if the server has the target that the options name. Raises: ValueError."""
    info = server_info(url)
    for flag in ("--model-path", "--revision"):
        served, wanted = info.get(flag.removeprefix("--").replace("-", "_")), options.get(flag)
        if served != wanted:
            raise ValueError(f"{url} was started with {flag} {served}, this stage needs {wanted}: start it with that")
    logger.info("%s serves %s with SGLang %s", url, info["model_path"], info["version"])
