"""Tokenising as tasks on a Ray cluster."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ddk_build.data.documents import TokenisedPart
from ddk_build.data.sources import Part
from ddk_build.tokenize.workers import Job, Submit, tokenise_part
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.util.processes import enter_folder


@contextmanager
def ray_tasks() -> Iterator[tuple[Submit, int]]:
    """Tokenise as tasks on the cluster that this process has joined.

    The tasks reserve no CPUs: the engines hold those while they wait for the tokens.
    """
    import ray

    task = ray.remote(_tokenise_part).options(num_cpus=0, scheduling_strategy="SPREAD")
    folder = os.getcwd()

    def submit(job: Job, part: Part) -> Callable[[], TokenisedPart]:
        call = task.remote(folder, job, part)

        def result() -> TokenisedPart:
            try:
                tokenised: TokenisedPart = ray.get(call)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, ConfigError | CacheError):
                    raise cause from error
                reason = " ".join(str(error).split())
                raise CacheError(f"tokenising on the cluster failed: {reason}") from error
            return tokenised

        return result

    yield submit, int(ray.cluster_resources()["CPU"])


def _tokenise_part(folder: str, job: Job, part: Part) -> TokenisedPart:
    """Tokenise a part; ``folder`` is the build's working directory."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    enter_folder(folder)
    return tokenise_part(job, part)
