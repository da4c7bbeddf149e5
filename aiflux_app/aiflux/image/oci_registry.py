"""Check whether an OCI registry is reachable, and resolve tags to digests.

Protocol: https://github.com/opencontainers/distribution-spec/blob/main/spec.md
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus

_TIMEOUT = 8.0
_MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_API_HOSTS = {"docker.io": "registry-1.docker.io"}
"""Registries whose API host differs from the host in references."""


@dataclass(frozen=True)
class Reference:
    """A parsed ``docker://`` reference; ``version`` is a tag or a digest with its algorithm."""

    host: str
    name: str
    version: str

    @property
    def insecure(self) -> bool:
        """Whether to use plain http: only on loopback."""
        host = self.host.rpartition(":")[0] or self.host
        return host == "localhost" or host.startswith("127.")

    @property
    def api_host(self) -> str:
        """Host of the registry's API."""
        return _API_HOSTS.get(self.host, self.host)

    @property
    def url(self) -> str:
        """Base URL of the registry's API, with a trailing slash."""
        return f"{'http' if self.insecure else 'https'}://{self.api_host}/v2/"


def parse(reference: str) -> Reference:
    """Parse ``docker://[HOST/]NAME[:TAG|@DIGEST]`` the way docker does."""
    rest = reference.removeprefix("docker://")
    first, slash, others = rest.partition("/")
    is_host = slash and ("." in first or ":" in first or first == "localhost")
    host, path = (first, others) if is_host else ("docker.io", rest)
    tagged, _, pinned = path.partition("@")
    name, _, tag = tagged.partition(":")
    if host == "docker.io" and "/" not in name:
        name = f"library/{name}"
    return Reference(host, name, pinned or tag or "latest")


def why_unreachable(reference: Reference) -> str | None:
    """Return why the registry is unreachable, or None. A login request counts as reachable."""
    try:
        status, _ = _request("GET", reference.url)
    except OSError as error:
        return f"{reference.host} does not respond: {_reason(error)}"
    if status in (HTTPStatus.OK, HTTPStatus.UNAUTHORIZED):
        return None
    return f"{reference.host} returned status {status}"


def why_silent(host: str) -> str | None:
    """Return why a host does not respond over https, or None. Any status counts as a response."""
    try:
        _request("GET", f"https://{host}/v2/")
    except OSError as error:
        return f"{host} does not respond: {_reason(error)}"
    return None


def digest(reference: Reference) -> str | None:
    """Return the digest that a reference resolves to, or None if unknown."""
    if ":" in reference.version:
        return reference.version
    url = f"{reference.url}{reference.name}/manifests/{reference.version}"
    headers = {"Accept": _MANIFESTS}
    try:
        status, answer = _request("HEAD", url, headers)
        if status == HTTPStatus.UNAUTHORIZED:
            headers |= _authorization(answer.get("WWW-Authenticate", ""))
            status, answer = _request("HEAD", url, headers)
    except (OSError, ValueError):
        return None
    return answer.get("Docker-Content-Digest") if status == HTTPStatus.OK else None


def _authorization(challenge: str) -> dict[str, str]:
    """Return an anonymous token for the scope in the registry's challenge."""
    values = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = values.pop("realm", "")
    if not realm.startswith("https://"):
        return {}
    with urllib.request.urlopen(  # noqa: S310 - https only, see above
        f"{realm}?{urllib.parse.urlencode(values)}", timeout=_TIMEOUT
    ) as response:
        answer = json.load(response)
    return {"Authorization": f"Bearer {answer.get('token') or answer.get('access_token')}"}


def _request(method: str, url: str, headers: dict[str, str] | None = None) -> tuple[int, Message]:
    """Send a request; return status and headers, whatever the status."""
    request = urllib.request.Request(url, method=method, headers=headers or {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:  # noqa: S310
            return response.status, response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


def _reason(error: OSError) -> str:
    reason = getattr(error, "reason", error)
    return str(getattr(reason, "strerror", None) or reason)
