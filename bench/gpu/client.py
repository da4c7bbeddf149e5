"""The simplest efficient client: aiohttp with N requests in flight. URL INPUT OUTPUT N.

Reads and writes the same files as AI-Flux, and checks only the status.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import aiohttp


async def _send(
    session: aiohttp.ClientSession, url: str, lines: Iterator[bytes], output: BinaryIO
) -> None:
    for line in lines:
        request = json.loads(line)
        async with session.post(url + request["url"], json=request["body"]) as response:
            body = await response.json()
            assert response.status == 200, f"{response.status}: {body}"
        answer = {"custom_id": request["custom_id"], "response": {"body": body}}
        output.write(json.dumps(answer).encode() + b"\n")


async def run(url: str, source: Path, target: Path, in_flight: int) -> None:
    """Send every request of a file, ``in_flight`` at a time."""
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        with open(source, "rb") as lines, open(target, "wb") as output:
            senders = (_send(session, url, lines, output) for _ in range(in_flight))
            await asyncio.gather(*senders)


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
