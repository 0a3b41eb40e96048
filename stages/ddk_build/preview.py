"""``ddk-cache show build.yaml``: rows as a build will tokenise them, without an engine."""

from collections.abc import Iterator
from itertools import islice

from ddk_build.config import BuildConfig
from ddk_build.data.corpus import DocumentMaker
from ddk_build.data.documents import IngestStatistics
from ddk_build.data.packing.packer import Packer, Row, add_documents, to_arrays
from ddk_build.data.written import with_columns
from ddk_build.teacher.tokenizer import load_tokenizer, vocabulary
from ddk_cache import Rows
from ddk_cache.errors import ConfigError
from ddk_cache.format.vocabulary import Vocabulary
from ddk_cache.util.packages import require


def preview(path: str, domain: str | None, row: int) -> Iterator[tuple[str, Rows, Vocabulary]]:
    """Yield the name, one row and the vocabulary of each domain of a configuration, or of one.

    Rows are filled one after another; a build, which keeps more of them open, fills them better.

    Raises ConfigError if the configuration is wrong, or the domain or row does not exist.
    """
    require("build-transformers", "transformers", "datasets")
    config = with_columns(BuildConfig.from_yaml(path))
    if domain is not None and domain not in config.domains:
        raise ConfigError(f"--domain {domain}: {path} has {', '.join(config.domains)}")
    tokenizer = load_tokenizer(config.teacher)
    for name in config.domains if domain is None else [domain]:
        maker = DocumentMaker(name, config.domains[name], tokenizer, config.seed, config.seq_length)
        packed = next(islice(_rows(maker, config.context), row, None), None)
        if packed is None:
            raise ConfigError(f"--row {row}: {name} has fewer rows; they begin with 0")
        yield name, Rows.from_arrays(to_arrays([packed], config.seq_length)), vocabulary(tokenizer)


def _rows(maker: DocumentMaker, overlap: int) -> Iterator[Row]:
    packer = Packer(maker.seq_length, open_rows=1)
    for document in maker.documents(IngestStatistics()):
        yield from add_documents(packer, [document], overlap)
    yield from packer.flush()
