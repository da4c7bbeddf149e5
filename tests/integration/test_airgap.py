"""Without internet: from a bundle to results, signed images, and sealed runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.integration.conftest import (
    FRANCE,
    MODEL,
    User,
    answers,
    lines,
    recorded,
    request,
    shard_status,
    until,
)
from tests.unit.made_snapshots import COMMIT, put_pulled

SLURM = {"sbatch", "squeue", "scancel", "sinfo", "sacct", "scontrol", "srun"}
OUTSIDER = 4242  # an unused user id


@pytest.fixture(scope="session")
def bundle(user: User, aiflux: Path, image: Path, models: Path) -> Path:
    """A bundle, created as on a connected machine."""
    place = user.folder("connected")
    printed = user.run(
        aiflux, "bundle", "create", "--model", MODEL, "--image", image, "--models-dir", models,
        "--python", "3.11", "--python", f"3.{sys.version_info[1]}", "-o", "b.tar", cwd=place,
    )  # fmt: skip
    assert MODEL in printed
    assert "extras: documents, duckdb, gateway, hub, images, pandoc, parquet, report," in printed
    assert "sha256:" in printed.splitlines()[-1]
    return place / "b.tar"


class Island:
    """A network namespace without outside connection, and commands of the user in it."""

    def __init__(self, user: User) -> None:
        self.user = user
        self.programs = user.folder("programs without Slurm")
        for program in Path("/usr/bin").iterdir():
            if program.name not in SLURM and not (self.programs / program.name).exists():
                (self.programs / program.name).symlink_to(program)
        script = "ip link set lo up 2>/dev/null; echo up; exec sleep infinity"
        root = os.geteuid() == 0
        wrap = ["unshare", "--net"] if root else ["unshare", "--net", "--map-root-user"]
        self.holder = subprocess.Popen(
            [*wrap, "sh", "-c", script], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "up\n", "cannot create a network namespace"

    def run(self, *command: str | Path, cwd: Path, code: int | None = 0) -> str:
        """Run as the user in the namespace, with the machine's programs except Slurm's."""
        enter = ["nsenter", "--net", "--target", str(self.holder.pid)]
        if os.geteuid() != 0:
            enter[1:1] = ["--user", "--preserve-credentials"]
        done = subprocess.run(
            [*enter, *self.user.command(command)],
            cwd=cwd, env=self.user.environment({"PATH": str(self.programs)}),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        printed = done.stdout + done.stderr
        if code is not None:
            assert done.returncode == code, printed
        return printed

    def close(self) -> None:
        self.holder.kill()
        self.holder.wait()
        assert self.holder.stdout is not None
        self.holder.stdout.close()


@pytest.fixture
def island(user: User) -> Iterator[Island]:
    island = Island(user)
    yield island
    island.close()


def test_from_a_bundle_to_results_without_a_network(
    user: User, bundle: Path, island: Island
) -> None:
    place = user.folder("island, 'far' away")
    printed = island.run("/usr/bin/python3", "-c", "import socket; socket.create_connection("
                      "('192.0.2.1', 80), 3)", cwd=place, code=1)  # fmt: skip
    assert "Network is unreachable" in printed, "there is no connection to the outside"
    island.run("tar", "-xf", bundle, "aiflux-bundle/install.py", cwd=place)
    soft, models = place / "soft ware", place / "the models"
    install = ["/usr/bin/python3", "aiflux-bundle/install.py", bundle, "--prefix", soft]
    install += ["--models-dir", models]
    printed = island.run(*install, cwd=place)
    command = soft / "bin" / "aiflux"
    assert str(command) in printed
    assert not (models / ".staging").exists()
    assert "is complete" in island.run(command, "bundle", "verify", bundle, cwd=place)
    printed = island.run(command, "doctor", cwd=place, code=2)
    assert "FAIL slurm" in printed, "this namespace has no Slurm"
    assert printed.count("FAIL ") == 1, printed
    assert f"1 model ({MODEL})" in printed
    assert "ok   sealing" in printed
    user.write(place / "in.jsonl", lines(FRANCE))
    run = [command, "run", "--local", "--model", MODEL, "--input", "in.jsonl", "--output", "o.json"]
    island.run(*run, cwd=place)
    assert "Paris" in answers(place / "o.json")["france"]
    assert shard_status(place)["aiflux"]["sealed"] is True
    printed = island.run(command, "report", "o.json", "--output", "r.html", cwd=place)
    assert "matplotlib" not in printed
    assert "<svg" in (place / "r.html").read_text(encoding="utf-8"), "drawn without matplotlib"
    table = ["results", "to-parquet", "o.json", "--output", "o.parquet"]
    island.run(command, *table, cwd=place)
    assert (place / "o.parquet").read_bytes().startswith(b"PAR1")
    before = (models / "blobs").stat().st_mtime_ns
    printed = island.run(command, "bundle", "install", bundle, *install[3:], cwd=place)
    assert str(command) in printed
    assert (models / "blobs").stat().st_mtime_ns == before, "nothing was written again"


def test_each_python_has_its_packages_whichever_creates_the_bundle(
    user: User, aiflux: Path
) -> None:
    """pip itself would decide for the Python that runs it."""
    place = user.folder("other versions")
    create = [aiflux, "bundle", "create", "--no-image", "--extra", "gateway", "--extra", "zstd"]
    user.run(*create, "--python", "3.10", "--python", "3.14", "-o", "b.tar", cwd=place)
    contents = json.loads(user.run(aiflux, "bundle", "verify", "b.tar", "--json", cwd=place))
    old, new = (
        {wheel.removeprefix("wheels/").partition("-")[0] for wheel in contents["pythons"][python]}
        for python in ("3.10", "3.14")
    )
    assert {"anyio", "exceptiongroup", "backports_zstd"} <= old
    assert "anyio" in new
    assert not {"exceptiongroup", "backports_zstd"} & new


def test_a_bundle_brings_a_model_of_hugging_face(
    user: User, aiflux: Path, vllm: Path, hub_model: Path, island: Island
) -> None:
    connected = user.folder("connected to the hub")
    name, models = "hf:HuggingFaceTB/SmolLM2-135M-Instruct", connected / "models"
    files = {path.name: path.read_bytes() for path in hub_model.iterdir()}
    put_pulled(models / "hub", name.removeprefix("hf:"), files)
    user.give(connected)
    python = ["--python", "3.11", "--no-extras"]
    user.run(
        aiflux, "bundle", "create", "--model", name, "--no-image", "--models-dir", models, *python,
        "-o", "b.tar", cwd=connected,
    )  # fmt: skip
    place = user.folder("island without a hub")
    island.run("tar", "-xf", connected / "b.tar", "aiflux-bundle/install.py", cwd=place)
    install = ["/usr/bin/python3", "aiflux-bundle/install.py", connected / "b.tar"]
    printed = island.run(*install, "--prefix", place / "soft", cwd=place)
    assert f"model: {name} in {place / 'soft' / 'models'}" in printed
    command = place / "soft" / "bin" / "aiflux"
    assert f"commit {COMMIT}" in island.run(command, "models", "verify", name, cwd=place)
    user.write(
        place / "in.jsonl", lines(request("france", "What is the capital of France?", model=None))
    )
    run = [command, "run", "--local", "--engine", "vllm", "--model", name, "--input", "in.jsonl"]
    island.run(
        "env", f"AIFLUX_ENGINE_PROGRAM={vllm}", *run, "--context-length", "512", "--output",
        "o.json", "--engine-env", f"VLLM_CACHE_ROOT={user.home / 'vllm-cache'}", cwd=place,
    )  # fmt: skip
    (entry,) = json.loads((place / "o.json").read_text(encoding="utf-8"))
    assert "Paris" in entry["output"]["choices"][0]["message"]["content"]
    assert entry["metadata"]["model_digest"] == COMMIT


def test_a_damaged_bundle_installs_nothing(user: User, bundle: Path, aiflux: Path) -> None:
    place = user.folder("damaged")
    bad = place / "bad.tar"
    user.run("cp", bundle, bad)
    with bad.open("r+b") as file:
        file.seek(bad.stat().st_size // 2)
        file.write(b"\0damage\0")
    printed = user.run(aiflux, "bundle", "verify", bad, code=2)
    assert "was modified or truncated" in printed
    install = ["bundle", "install", bad, "--prefix", place / "p"]
    assert "was modified or truncated" in user.run(aiflux, *install, code=2)
    with bad.open("r+b") as file:
        file.truncate(bad.stat().st_size * 2 // 3)
    assert "is not a complete bundle" in user.run(aiflux, *install, code=2)
    assert [path for path in (place / "p").rglob("*") if not path.is_dir()] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_leaves_no_partial_installation(user: User, bundle: Path, aiflux: Path) -> None:
    disk = user.folder("small disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m,mode=0777", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        install = ["bundle", "install", bundle, "--prefix", disk / "p"]
        printed = user.run(aiflux, *install, code=5)
        assert "MB are free; nothing was installed" in printed
        assert "--prefix" in printed
        assert [path for path in disk.rglob("*") if not path.is_dir()] == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- signatures -------------------------------------------------------------------------------


def test_a_signed_image_shows_its_signer_and_modifications(
    user: User, aiflux: Path, image: Path
) -> None:
    place = user.folder("signing")
    signer = replace(user, home=user.folder("signing/home"))
    stranger = replace(user, home=user.folder("signing/stranger"))
    mine = place / "mine.sif"
    user.run("cp", image, mine)
    info = [aiflux, "image", "info", mine]
    assert "not signed" in signer.run(*info, cwd=place)
    assert "no PGP key" in signer.run(aiflux, "image", "sign", mine, cwd=place, code=2)
    signer.run(
        "apptainer", "key", "newpair", "--name", "Ann Example", "--email", "ann@example.org",
        "--comment", "test", "--password", "", "--push=false", "--bit-length", "2048",
    )  # fmt: skip
    printed = signer.run(aiflux, "image", "sign", mine, "--key", "3", cwd=place, code=2)
    assert "keyring: 0 Ann Example" in printed
    printed = signer.run(aiflux, "image", "sign", mine, "--key", "0", cwd=place)
    assert "verified: signed by Ann Example (test) <ann@example.org>" in printed
    assert "Ann Example" in signer.run(*info, cwd=place)
    env = {"AIFLUX_IMAGE": str(mine)}
    printed = signer.run(aiflux, "doctor", cwd=place, env=env, code=None)
    assert "ok   signature: verified: signed by Ann Example" in printed
    assert "not in your keyring" in stranger.run(*info, cwd=place)
    printed = stranger.run(aiflux, "doctor", cwd=place, env=env, code=None)
    assert "warn signature" in printed
    with mine.open("r+b") as file:
        file.seek(mine.stat().st_size // 2)
        file.write(b"changed")
    assert "modified since" in signer.run(*info, cwd=place)
    printed = signer.run(aiflux, "doctor", cwd=place, env=env, code=2)
    assert "FAIL signature" in printed


ALL_BUT_BUILDING = """\
#!/bin/sh
# The real Apptainer, except that a build copies an image built before. If FAIL is set, new images
# cannot be signed.
case "${FAIL:+$*}" in "sign "*.new) echo 'FATAL:   no room' >&2 && exit 255 ;; esac
[ "$1" = build ] || exec /usr/bin/apptainer "$@"
while [ $# -gt 2 ]; do shift; done
exec cp "$BUILT" "$1"
"""


def test_a_build_asks_for_the_passphrase_first_and_signs_the_image(
    user: User, aiflux: Path, image: Path
) -> None:
    place = user.folder("signed build")
    signer = replace(user, home=user.folder("signed build/home"))
    programs = user.folder("signed build/programs")
    apptainer = user.write(programs / "apptainer", ALL_BUT_BUILDING)
    apptainer.chmod(0o755)
    for name, word in (("Ann", ""), ("Bob", "a b $c")):
        signer.run(
            "apptainer", "key", "newpair", "--name", name, "--email", f"{name}@example.org",
            "--comment", "", "--password", word, "--push=false", "--bit-length", "2048",
        )  # fmt: skip
    env = {"BUILT": str(image), "PATH": f"{programs}:{signer.environment()['PATH']}"}
    new = place / "new.sif"
    build = [aiflux, "image", "build", "--base", "debian", "--output", new, "--sign"]
    printed = signer.run(*build, cwd=place, env=env, code=2)
    assert "keyring: 0 Ann" in printed
    printed = signer.run(*build, "--key", "1", cwd=place, env=env, code=2)
    assert "key 1 (Bob" in printed
    assert "none was entered" in printed
    assert not new.exists(), "no image was built"
    typed = 'echo "$1" | { shift; exec "$@"; }'
    printed = signer.run(
        "sh", "-c", typed, "sh", "wrong", *build, "--key", "1", cwd=place, env=env, code=2
    )
    assert "does not sign with this passphrase" in printed
    printed = signer.run(
        "sh", "-c", typed, "sh", "a b $c", *build, "--key", "1", cwd=place, env=env
    )
    assert "verified: signed by Bob" in printed
    assert "verified: signed by Bob" in signer.run(aiflux, "image", "info", new, cwd=place)
    make = ["make", "image", "BASE=debian", f"IMAGE={new}", "SIGN=1", "KEY=0"]
    printed = signer.run(*make, cwd=aiflux.parents[2], env=env)
    assert "verified: signed by Ann" in printed
    new.unlink()
    printed = signer.run(*build, "--key", "0", cwd=place, env={**env, "FAIL": "1"}, code=2)
    assert f"{new} was built but not signed: " in printed
    assert "no room" in printed
    assert f"-> aiflux image sign '{new}' --key 0" in printed
    assert "not signed" in signer.run(aiflux, "image", "info", new, cwd=place)
    assert [path.name for path in place.glob("*.sif*")] == ["new.sif"]


# --- sealed runs ------------------------------------------------------------------------------


class Listener:
    """A server on all addresses of this machine that records its clients."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._socket = socket.create_server(("", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                connection, address = self._socket.accept()
            except OSError:
                return
            self.calls.append(address[0])
            connection.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


def own_addresses() -> list[str]:
    """Return the IPv4 addresses of this machine, loopback included."""
    printed = subprocess.run(["ip", "-o", "-4", "addr"], capture_output=True, text=True, check=True)
    return [line.split()[3].partition("/")[0] for line in printed.stdout.splitlines()]


def arguments_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    """Return all descendants of a process."""
    parents = {}
    for proc in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            stat = (proc / "stat").read_text(errors="replace")
            parents[int(proc.name)] = int(stat.rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


@dataclass(frozen=True)
class Engine:
    """The engine of a running run.

    Attributes:
        pid: pid of the Ollama server.
        port: port on which it listens.
    """

    pid: int
    port: int


def engine_of(run: int) -> Engine:
    """Return the engine among the descendants of a process."""
    below = [(pid, arguments_of(pid)) for pid in descendants(run)]
    (server,) = (pid for pid, words in below if words[1:] == ["serve"])
    (port,) = listening(server)
    return Engine(server, port)


def listening(pid: int) -> list[int]:
    """Return the TCP ports on which a process listens."""
    own = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            own.add(os.readlink(descriptor))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [
        int(row[1].partition(":")[2], 16)
        for row in rows
        if row[3] == "0A" and f"socket:[{row[9]}]" in own
    ]


@contextmanager
def running(user: User, aiflux: Path, place: Path, models: Path, *more: str) -> Iterator[Engine]:
    """Run for a while, and yield the engine."""
    many = [request(f"r{index}", f"Count to {index}.", max_tokens=16) for index in range(400)]
    user.write(place / "in.jsonl", lines(*many))
    run = user.popen(
        aiflux, "run", "--local", "--input", "in.jsonl", "--output", "out.json",
        "--models-dir", models, "--drain-seconds", "0", *more, cwd=place,
    )  # fmt: skip
    try:
        until(lambda: recorded(place), "a result", 180)
        yield engine_of(run.pid)
    finally:
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=180)


CALL = """
import socket, sys
for place in sys.argv[1:]:
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 3).close()
        print(place, "answers")
    except OSError as error:
        print(place, "is silent:", error)
"""
ASK = (
    "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3); print('in')"
)


def as_outsider(command: list[str]) -> list[str]:
    """Return a command to run as another user of this machine."""
    ids = ["--reuid", str(OUTSIDER), "--regid", str(OUTSIDER), "--clear-groups"]
    return [shutil.which("setpriv") or "setpriv", *ids, "--", *command]


def reaches(address: str, port: int) -> bool:
    """Return whether another user of this machine can connect to an address."""
    command = as_outsider(["/usr/bin/python3", "-c", ASK, address, str(port)])
    done = subprocess.run(command, capture_output=True, check=False, cwd="/", timeout=120)
    return done.returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")
def test_a_sealed_run_is_isolated_in_both_directions(
    user: User, aiflux: Path, image: Path, models: Path, listener: Listener
) -> None:
    place = user.folder("sealed")
    outside = [f"{address}:{listener.port}" for address in own_addresses()]
    assert len(outside) > 1, "addresses other than loopback"
    with running(user, aiflux, place, models) as engine:
        # Test what the container can reach, with its Python in the engine's namespaces.
        enter = ["nsenter", "--target", str(engine.pid), "--user", "--preserve-credentials"]
        inside = user.command([*enter, "--net", "--mount", "--root", "--", "python3"])
        printed = subprocess.run(
            [*inside, "-c", CALL, *outside, "192.0.2.1:80"],
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout.splitlines()  # fmt: skip
        assert len(printed) == len(outside) + 1
        assert all("is silent" in line for line in printed), printed
        assert listener.calls == [], "no connection arrived"
        reached_inside = subprocess.run([*inside, "-c", CALL, f"127.0.0.1:{engine.port}"],
                                     capture_output=True, text=True, check=True).stdout  # fmt: skip
        assert "answers" in reached_inside, "the engine is reachable from inside"
        for address in own_addresses():
            assert reaches(address, listener.port), "another user reaches an unsealed server"
            assert not reaches(address, engine.port), "but not the engine"
        entering = as_outsider([*enter, "--net", "--", "true"])
        refused = subprocess.run(entering, capture_output=True, text=True, check=False)
        assert refused.returncode != 0, "another user cannot enter the namespace"
        run_dir = place / "out.json.aiflux"
        look = as_outsider(["ls", str(run_dir)])
        assert subprocess.run(look, capture_output=True, check=False).returncode != 0
        assert shard_status(place)["aiflux"]["sealed"] is True
    status_text = user.run(aiflux, "status", "out.json", cwd=place)
    assert "sealed: no network access" in status_text
    assert user.none_left(), user.processes()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")
def test_a_site_can_disable_the_seal_and_the_status_says_so(
    user: User, aiflux: Path, image: Path, models: Path
) -> None:
    place = user.folder("unsealed")
    with running(user, aiflux, place, models, "--no-seal") as engine:
        assert os.stat(f"/proc/{engine.pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
        assert reaches("127.0.0.1", engine.port), "without the seal, other users reach the engine"
        facts = shard_status(place)["aiflux"]
        assert (facts["sealed"], facts["unsealed"]) == (False, "--no-seal")
    assert "not sealed: --no-seal" in user.run(aiflux, "status", "out.json", cwd=place)
    content = json.loads(user.run(aiflux, "status", "out.json", "--json", cwd=place))
    assert content["shards"][0]["unsealed"] == "--no-seal"
