"""A small stand-in for ssh: it forwards a port as ``-L`` asks, and ends with its standard input."""

from __future__ import annotations

import socket
import sys
import threading


def forward(source: socket.socket, target: socket.socket) -> None:
    while data := source.recv(1 << 16):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)


def accept(server: socket.socket, host: str, port: int) -> None:
    while True:
        near, _ = server.accept()
        try:
            far = socket.create_connection((host, port))
        except OSError:
            near.close()
            continue
        for pair in ((near, far), (far, near)):
            threading.Thread(target=forward, args=pair, daemon=True).start()


words = sys.argv[1:]
local_host, local, host, port = words[words.index("-L") + 1].split(":")
assert words[-2:] == [words[words.index("--") + 1], "cat"]
try:
    listening = socket.create_server((local_host, int(local)))
except OSError as error:
    sys.exit(f"bind [{local_host}]:{local}: {error.strerror}")
threading.Thread(target=accept, args=(listening, host, int(port)), daemon=True).start()
sys.stdin.read()
