"""What ``ddk-cache doctor`` says of a cache's address."""

import pytest

from ddk_cache.cli.doctor import _access


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("s3://[x", "is not a valid URL: Invalid IPv6 URL"),
        ("ftp://host/cache?x=1", "ftp://host/cache: a cache is a folder or begins with one of file:// "),
    ],
)
def test_an_address_without_a_cache_is_one_line(url: str, line: str) -> None:
    assert _access(url).startswith(line)
