"""Paths and URLs in configurations: variables are expanded, credentials refused."""

import os
import re
from string import Template
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, StringConstraints

from ddk_cache.errors import ConfigError

# Words in the names of URL parameters that hold secrets, such as X-Amz-Signature or api_key.
SECRETS = {
    *("apikey", "auth", "authorization", "credential", "jwt", "key", "password", "passwd", "pwd", "secret"),
    *("sig", "signature", "token"),
}


def refuse_credentials(address: str) -> str:
    """Return ``address`` unless it is a URL with credentials: addresses are kept in files and logs.

    Raises ConfigError if the URL has a user, a password, a secret parameter or a part after "#", which no
    address needs; the message shows none of it.
    """
    for url in address.split("::"):  # fsspec's chained URLs: zip://file::https://...
        try:
            parts = urlsplit(url)
        except ValueError:
            raise ConfigError("is not a valid URL") from None
        names = (name.lower().replace("_", "-").split("-") for name, _ in parse_qsl(parts.query))
        has_secret = any(SECRETS.intersection(words) for words in names)
        if "://" in url and (has_secret or "@" in parts.netloc or parts.fragment):
            raise ConfigError(
                f"{redact(url)}: contains credentials or a part after #, which would be kept in files and "
                "logs; give credentials in the environment (AWS_ACCESS_KEY_ID, AZURE_STORAGE_ACCOUNT_KEY, "
                "GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN; ~/.netrc for https)"
            )
    return address


def refuse_url(address: str) -> str:
    """Return ``address`` unless it is a URL; raise ConfigError, which does not show it."""
    if "://" in address:
        raise ConfigError("must be a folder of this machine, not a URL")
    return address


def check_revision(revision: str) -> str:
    """Return ``revision`` if it can be a branch, tag or commit; raise ConfigError, which does not show it."""
    if re.search(r"[\s~^:?*\[\\@#]|\.\.|^[-/]|/$|hf_\w{20}", revision):
        raise ConfigError("is not the name of a branch, a tag or a commit (credentials: in the environment)")
    return revision


def redact(url: str) -> str:
    """Return ``url`` without user, password, port, parameters and fragment; a path unchanged."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=parts.hostname or "", query="", fragment="").geturl()


def expand(address: str) -> str:
    """Return ``address`` with ``~`` and ``$VARIABLE`` expanded; raise ConfigError for an unset variable."""
    template = Template(os.path.expanduser(address))
    for name in template.get_identifiers():
        if name not in os.environ:
            raise ConfigError(f"the environment variable {name} is not set")
    return template.safe_substitute(os.environ)


Address = Annotated[
    str, StringConstraints(min_length=1), AfterValidator(expand), AfterValidator(refuse_credentials)
]
"""A folder, file, URL or hub id in a configuration, expanded and without credentials."""

LocalFolder = Annotated[Address, AfterValidator(refuse_url)]
"""A folder in a configuration."""

Revision = Annotated[str, StringConstraints(min_length=1), AfterValidator(check_revision)]
"""A branch, tag or commit in a configuration."""
