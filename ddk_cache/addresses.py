"""Paths and URLs as a user gives them: what a shell makes of them, and what must not stand in them."""

import os
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, StringConstraints

from ddk_cache.errors import ConfigError

# Names of secrets in a URL's query or fragment: what they hold, or end in ("token", but not "tokenizer").
SECRET = re.compile(
    "secret|signature|passw|credential|token(?!i)|bearer|jwt|accesskey"
    "|(sig|key|pwd|pass|sas|auth|authorization|session)$"
)
NAME = re.compile(r"[?&;#]([^=?&;#]*)=")
USER = re.compile(r"://[^/?#]*@")


def refuse_credentials(address: str) -> str:
    """Let no secret go where addresses go: into manifests, configurations, logs and trackers.

    Raises
    ------
    ConfigError
        The URL holds a user, a password or a signature. The message does not.
    """
    if "://" not in address:
        return address
    try:
        parts = urlsplit(address)
    except ValueError:
        raise ConfigError("is not a valid URL") from None
    plain = unquote(unquote(address))  # one URL may stand in another: zip://file::https://...
    if USER.search(plain) or any(SECRET.search(name.lower()) for name in NAME.findall(plain)):
        host = parts.netloc.rpartition("@")[2].partition(":")[0]
        raise ConfigError(
            f"{parts.scheme}://...{host}: credentials do not belong into a URL, "
            "which is kept in files and logs; give them by the environment (AWS_ACCESS_KEY_ID, "
            "GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY, HF_TOKEN; ~/.netrc for https)"
        )
    return address


def expand(address: str) -> str:
    """``~`` and ``$VAR`` as a shell has them.

    Raises
    ------
    ConfigError
        A variable is not set, where a shell would take nothing for it; or no path can be so named.
    """
    found = os.path.expanduser(re.sub(r"\$(?:(\w+)|\{(\w+)\})", _value, address))
    if "\0" in found:
        raise ConfigError("holds a NUL character, which no path may")
    return found


def _value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name not in os.environ:
        raise ConfigError(f"the environment has no variable {name}")
    return os.environ[name]


def check_model(key: str, name: str) -> None:
    """Raise ConfigError where ``name`` can only be a folder's, and there is none: a hub id has one slash.

    The hub's own message for these is about the form of its names.
    """
    if (name[0] in "./" or name.count("/") > 1) and not Path(name).is_dir():
        raise ConfigError(f"{key}: {name}: there is no such folder")


def explain_load_failure(name: str, reason: str) -> str:
    """Why a model cannot be loaded; of one that may be a folder or a hub id, what was looked for."""
    if not Path(name).is_dir():
        return f"there is no folder {name} here, and as a hub id: {reason}"
    return reason if (Path(name) / "config.json").is_file() else "the folder holds no model: no config.json"


Address = Annotated[
    str, StringConstraints(min_length=1), AfterValidator(expand), AfterValidator(refuse_credentials)
]
"""A configuration's folder, file, URL or hub id, as it is meant; without secrets."""
