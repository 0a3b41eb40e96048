"""Tokenising as tasks on a Ray cluster."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ddk_build.documents import Found
from ddk_build.tokenisers import Submit, tokenise_part
from ddk_cache.errors import CacheError, ConfigError


def address_of_cluster() -> str:
    """Where to join: RAY_ADDRESS, or the cluster that this process has started."""
    import ray

    if ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        return str(ray.get_runtime_context().gcs_address)
    return os.environ.get("RAY_ADDRESS") or "local"


@contextmanager
def ray_tasks(address: str) -> Iterator[tuple[Submit, int]]:
    """Tokenise as tasks on the cluster, which is joined first where this process has not.

    They take no room that an engine may want, so that neither waits for the other.
    """
    import ray

    if not ray.is_initialized():
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    task = ray.remote(_tokenise_part).options(num_cpus=0, scheduling_strategy="SPREAD")
    folder = os.getcwd()

    def submit(*part: Any) -> Callable[[], Found]:
        call = task.remote(folder, *part)

        def result() -> Found:
            try:
                found: Found = ray.get(call)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, ConfigError | CacheError):
                    raise cause from error
                reason = " ".join(str(error).split())
                raise CacheError(f"tokenising on the cluster failed: {reason}") from error
            return found

        return result

    yield submit, int(ray.cluster_resources()["CPU"])


def _tokenise_part(folder: str, *part: Any) -> Found:
    """``folder``: where the build was started; relative paths mean here what they mean there."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with suppress(FileNotFoundError):
        os.chdir(folder)
    return tokenise_part(*part)
