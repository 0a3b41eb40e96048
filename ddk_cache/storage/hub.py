"""Caches and students on the Hugging Face hub. Access goes by HF_TOKEN, or by what `hf auth login` stored."""

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from ddk_cache.errors import CacheError, ConfigError, brief, printable
from ddk_cache.storage.folder import Folder

SCHEME = "hf://"
_ADDRESS = re.compile(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def snapshot(url: str) -> Path:
    """Download a data set's repository, unless this machine has it, and return its folder of links.

    ``url`` is hf://OWNER/NAME, or hf://OWNER/NAME@REVISION.

    Raises ConfigError if the URL has another form, and CacheError if the repository cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    match = _ADDRESS.fullmatch(url)
    if match is None:
        raise ConfigError(f"{url}: write hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    repository, revision = match.groups()
    try:
        return Path(str(snapshot_download(repository, repo_type="dataset", revision=revision)))
    except Exception as error:  # of the hub's client, its HTTP library, or the file system
        raise CacheError(f"{url}: cannot be downloaded: {brief(error)}") from error


def push(folder: Path, repository: str, kind: str, *, public: bool, left_out: Sequence[str]) -> str:
    """Upload a folder to a repository, which is made if it does not exist; return its address.

    Parameters
    ----------
    repository
        OWNER/NAME.
    kind
        "dataset" or "model".
    public
        Make a new repository public. An existing one stays as it is.
    left_out
        Patterns of files that stay here, such as ``"checkpoint-*"``.

    Raises ConfigError for a link that leads out of the folder, and CacheError if the upload fails.
    """
    from huggingface_hub import HfApi

    inside = Folder(folder, create=False).sizes("")
    links = (path for path in folder.rglob("*") if path.is_symlink() and path.is_file())
    for key in (path.relative_to(folder).as_posix() for path in links):
        if key not in inside and not any(fnmatch(key, pattern) for pattern in left_out):
            raise ConfigError(
                f"{folder}/{printable(key)}: is a link that leads out of the folder, to a file that would be "
                "uploaded: remove it, or put a copy there"
            )
    api = HfApi(library_name="ddk-cache")
    try:
        address = api.create_repo(repository, repo_type=kind, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=folder,
            commit_message="Upload by ddk-cache",
            ignore_patterns=list(left_out),
        )
    except Exception as error:  # of the hub's client, its HTTP library, or the file system
        raise CacheError(f"{repository}: cannot be uploaded: {brief(error)}") from error
    return str(address)
