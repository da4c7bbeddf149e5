"""An engine on several nodes: rank 0 and the processes on the other nodes, over real pipes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiflux.engines.base import Engine
from aiflux.engines.http import ExchangeError
from aiflux.engines.ranks import Address, Ranks, own_address
from aiflux.engines.vllm.kind import KIND
from aiflux.errors import ConfigError, EngineError, RejectedError
from tests.tools.engine_contract import ProgramSite, engine_of, until
from tests.unit.engines.test_vllm import CHAT, FAKE, plan_of
from tests.unit.helpers import logged_command
from tests.unit.made_snapshots import put_snapshot

SRUN = Path(__file__).parents[2] / "tools" / "fake_srun.py"
# As slurm/job.sh does it; every task runs a follower.
STEPS = """\
cd "$1"
while :; do
    rm -f orders reports
    mkfifo reports orders
    exec 7<orders 8>reports
    "$2" "$3" --nodes="$4" --ntasks="$4" --relative=1 --kill-on-bad-exit=1 sh follower <&7 >&8 &
    echo $! >>steps
    exec 7<&- 8>&-
    wait
done
"""


class Nodes(ProgramSite):
    """The nodes of a job, on this machine."""

    kind = KIND
    model = "hf:org/tiny"

    def __init__(self, folder: Path, nodes: int = 2, **environ: str) -> None:
        super().__init__(folder)
        put_snapshot(self.models_dir / "hub", "org/tiny")
        self.wrap([sys.executable, str(FAKE)])
        self.nodes = nodes
        self.environ |= {"SLURMD_NODENAME": "n1"}
        worker = shlex.join([sys.executable, "-m", "aiflux.worker"])
        (folder / "follower").write_text(
            f'echo $$ >>followers; exec {worker} --rank "$((SLURM_PROCID + 1))" '
            '--first "$SLURM_LAUNCH_NODE_IPADDR"\n',
            encoding="utf-8",
        )
        words = ["bash", "-c", STEPS, "bash", folder, sys.executable, SRUN, str(nodes - 1)]
        self.steps = subprocess.Popen(
            words, env={**self.environ, **environ}, start_new_session=True
        )
        self.ranks = Ranks(folder, nodes - 1)

    def engine(self, devices: tuple[str, ...] = (), **options: Any) -> Engine:
        chosen = {"model": self.model, "slots": 1, "load_timeout": 10.0, **options}
        plan = plan_of(self.folder, CHAT, nodes_per_engine=self.nodes, **chosen)
        engine = engine_of(KIND, plan, self.folder, self.environ, devices, ranks=self.ranks)
        self.made.append(engine)
        return engine

    def log(self, rank: int) -> Path:
        return self.folder / ("engine-0.log" if rank == 0 else f"engine-0-rank-{rank}.log")

    def servers(self) -> list[int]:
        """Return the processes of all ranks that still run."""
        return [pid for pid in map(int, self.pids.read_text().split()) if runs(pid)]

    def followers(self) -> list[int]:
        return [*map(int, (self.folder / "followers").read_text().split())]

    def close(self) -> None:
        super().close()
        self.ranks.close()
        until(lambda: not any(map(runs, self.followers())))
        os.killpg(self.steps.pid, signal.SIGKILL)
        self.steps.wait()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    made.close()


def answers(engine: Engine) -> bool:
    body = {"model": "org/tiny", "messages": [{"role": "user", "content": "hi"}]}
    try:
        sent = engine.client.post("/v1/chat/completions", json.dumps(body).encode())
    except ExchangeError:
        return False
    return sent.status == 200


def test_rank_0_and_the_other_ranks_serve_one_model(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, 4)
    try:
        engine = nodes.engine(context_length=3000, engine_env={"MINE": "1"})
        engine.start()
        assert answers(engine)
        commands = [logged_command(nodes.log(rank)) for rank in range(4)]
        for rank, words in enumerate(commands):
            for option, value in (("--nnodes", "4"), ("--tensor-parallel-size", "4"),
                                  ("--master-addr", "127.0.0.1"), ("--host", "127.0.0.1"),
                                  ("--node-rank", str(rank))):  # fmt: skip
                assert words[words.index(option) + 1] == value
            assert ("--headless" in words) == (rank > 0)
        assert len({words[words.index("--master-port") + 1] for words in commands}) == 1
        for pid in nodes.servers():
            environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
            expected = {"MINE=1", "VLLM_HOST_IP=127.0.0.1", "GLOO_SOCKET_IFNAME=lo"}
            assert expected <= {*environ}
            # Such a folder exists on one node only.
            local = any(each.startswith("VLLM_RPC_BASE_PATH=") for each in environ)
            assert local == ("--headless" not in command_of(pid))
        assert engine.facts.nodes == ("n1", "n2", "n3", "n4")
        assert engine.describe() == (
            "engine 0 is up on the CPU of n1, n2, n3 and n4: vLLM 0.99.0, 1 slot of 3000 tokens"
        )
        engine.stop()
        assert nodes.servers() == []
    finally:
        nodes.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_a_rank_ends_all_and_a_start_starts_all(nodes: Nodes, rank: int) -> None:
    engine = nodes.engine()
    engine.start()
    first = nodes.servers()
    (victim,) = (pid for pid in first if f"--node-rank\0{rank}" in command_of(pid))
    os.kill(victim, signal.SIGKILL)
    until(lambda: not engine.is_alive())
    assert not engine.is_ready()
    if rank > 0:  # without any request
        until(lambda: nodes.servers() == [])
    engine.start()
    assert answers(engine)
    assert len(nodes.servers()) == 2
    assert not {*nodes.servers()} & {*first}
    assert len(nodes.followers()) == 1


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_a_lost_step_ends_the_engine_and_is_started_again(nodes: Nodes) -> None:
    engine = nodes.engine()
    engine.start()
    os.kill(nodes.followers()[0], signal.SIGKILL)
    until(lambda: nodes.servers() == [])
    assert not engine.is_alive()
    engine.start()
    assert answers(engine)
    assert len(nodes.followers()) == 2


def test_the_end_of_the_worker_ends_the_ranks(nodes: Nodes) -> None:
    """However it ends: the kernel closes its pipes."""
    nodes.engine().start()
    nodes.ranks.close()
    until(lambda: not any(map(runs, nodes.followers())))
    until(lambda: len(nodes.servers()) == 1)  # rank 0 is the worker's own


def test_signals_to_all_processes_of_a_job_leave_the_ranks_to_the_worker(nodes: Nodes) -> None:
    engine = nodes.engine()
    engine.start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(nodes.followers()[0], number)
    time.sleep(0.3)
    assert answers(engine)


def test_a_rank_that_does_not_start_is_named_with_its_last_words(nodes: Nodes) -> None:
    nodes.wrap(["sh", "-c", 'case "$*" in *--headless*) echo no such GPU; exit 7;; esac; sleep 60'])
    with pytest.raises(EngineError, match="rank 1 on n2 exited with status 7: no such GPU") as got:
        nodes.engine().start()
    assert str(nodes.folder) in str(got.value.remedy)
    until(lambda: nodes.servers() == [])


def test_an_option_that_a_rank_does_not_know_is_not_tried_again(nodes: Nodes) -> None:
    with pytest.raises(RejectedError, match="vLLM does not accept --engine-arg"):
        nodes.engine(engine_arg={"no-such-option": "1"}).start()


def test_a_step_that_fails_is_not_tried_again_within_a_start(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path)
    (tmp_path / "follower").write_text("echo $$ >>followers; exit 2\n", encoding="utf-8")
    try:
        with pytest.raises(EngineError, match="on the other nodes ended before it was ready"):
            nodes.engine().start()
        assert len(nodes.followers()) == 1
    finally:
        nodes.close()


def test_nodes_that_are_not_ready_in_time_are_named(tmp_path: Path) -> None:
    for name in ("orders", "reports"):
        os.mkfifo(tmp_path / name)
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"the other nodes were not ready within 0\.3 s"):
        Ranks(tmp_path, 1).connect(threading.Event(), 0.3)
    assert time.monotonic() - started < 2


def test_nodes_with_other_numbers_of_gpus_are_refused(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, CUDA_VISIBLE_DEVICES="0")
    try:
        with pytest.raises(RejectedError, match="the job has 1 GPU on n2, but 2 on n1"):
            nodes.engine(("0", "1")).start()
    finally:
        nodes.close()


def test_the_gpus_of_all_nodes_divide_the_model(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, CUDA_VISIBLE_DEVICES="4,5")
    try:
        engine = nodes.engine(("0", "1"))
        engine.start()
        for rank in (0, 1):
            words = logged_command(nodes.log(rank))
            assert words[words.index("--tensor-parallel-size") + 1] == "4"
        own = {command_of(pid).count("--headless"): Path(f"/proc/{pid}/environ").read_text()
               for pid in nodes.servers()}  # fmt: skip
        assert "CUDA_VISIBLE_DEVICES=0,1\0" in own[0]
        assert "CUDA_VISIBLE_DEVICES=4,5\0" in own[1]
    finally:
        nodes.close()


def test_a_model_that_the_nodes_cannot_divide_is_refused(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, 3)
    try:
        with pytest.raises(ConfigError, match="3 nodes cannot divide them evenly") as caught:
            nodes.engine()
        assert caught.value.remedy == "--nodes-per-engine 1 or 2"
    finally:
        (tmp_path / "followers").touch()
        nodes.close()


def test_a_worker_with_one_node_refuses_the_engine(tmp_path: Path) -> None:
    put_snapshot(tmp_path / "models" / "hub", "org/tiny")
    plan = plan_of(tmp_path, CHAT, nodes_per_engine=2)
    with pytest.raises(ConfigError, match="only a job that `aiflux run` submits"):
        engine_of(KIND, plan, tmp_path, dict(os.environ))


def test_the_address_of_this_node_has_its_interface() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert Address.of_this_node("127.0.0.1") == Address("127.0.0.1", "lo")
    assert Address.of_this_node("192.0.2.1").interface == ""
