"""External links of the pages work. Internal links are checked in every test run."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from tests.conftest import OUTSIDE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"\]\((https?://[^)\s]+)\)")
_PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
LINKS = sorted({link for page in _PAGES for link in _LINK.findall(page.read_text("utf-8"))})


def test_external_links_are_found() -> None:
    assert LINKS


@pytest.mark.parametrize("link", LINKS)
def test_an_external_link_works(link: str) -> None:
    host = urlsplit(link).hostname
    assert host
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        pytest.skip(f"{OUTSIDE}{host} cannot be reached: {error}")
    answer = requests.get(link, timeout=30, headers={"User-Agent": "aiflux-docs-check"})
    assert answer.ok, f"{link}: HTTP {answer.status_code}"
