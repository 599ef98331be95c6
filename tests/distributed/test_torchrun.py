"""Training that torchrun starts: on one machine, and on two, which are network namespaces here."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from examples import train_parallel
from tests.distributed.ranks import on_ranks

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PROGRAM = ["-m", "examples.train_parallel", "--steps", "4"]


def environment(interface: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}


def losses(said: str) -> tuple[float, float]:
    found = re.search(r"loss ([\d.]+) -> ([\d.]+)", said)
    assert found, said[-3000:]
    return float(found[1]), float(found[2])


def on_one_machine(ranks: int, *args: str) -> tuple[float, float]:
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", str(ranks), *PROGRAM, *args]
    done = subprocess.run(
        command, cwd=ROOT, env=environment("lo"), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(done.stdout)


def said_alone() -> str:
    """What the program prints on one process, which no torchrun has started."""
    torch.distributed.destroy_process_group()  # it makes its own
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv[1:] = PROGRAM[2:]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train_parallel.main()
    return said.getvalue()


@pytest.fixture(scope="module")
def alone() -> tuple[float, float]:
    return losses(on_ranks(1, said_alone)[0])


@pytest.mark.slow
def test_torchrun_on_one_machine(alone: tuple[float, float]):
    first, last = alone
    assert last < first - 0.5
    assert on_one_machine(2, "--fsdp", "2") == pytest.approx(alone, abs=2e-4)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[tuple[str, str, str]]]:
    """Two network namespaces with a cable between them: (name, interface, address) of each."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip`: network namespaces are made with iproute2")
    mark = uuid.uuid4().hex[:6]
    hosts = [(f"fm-{mark}-{i}", f"fm{mark}{i}", f"10.231.77.{i + 1}") for i in range(2)]
    made: list[str] = []
    try:
        try:
            for name, _, _ in hosts:
                run("ip", "netns", "add", name)
                made.append(name)
            ends = [cable for _, cable, _ in hosts]
            run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for name, cable, address in hosts:
                run("ip", "link", "set", cable, "netns", name)
                inside = ("ip", "-n", name)
                run(*inside, "addr", "add", f"{address}/24", "dev", cable)
                run(*inside, "link", "set", cable, "up")
                run(*inside, "link", "set", "lo", "up")
        except (subprocess.CalledProcessError, OSError) as error:
            why = getattr(error, "stderr", "") or error
            pytest.skip(f"this machine lets us make no network namespaces: {str(why).strip()}")
        yield hosts
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("dim", ["dp", "fsdp"])
def test_two_hosts(dim: str, alone: tuple[float, float]):
    with two_hosts() as hosts:
        processes = []
        for i, (name, cable, address) in enumerate(hosts):
            command = [
                *("ip", "netns", "exec", name),
                *TORCHRUN,
                *("--nnodes", "2", "--nproc-per-node", "1"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0][2]}:29511"),
                *("--rdzv-id", "two-hosts", "--local-addr", address),
                # By its name this machine is both hosts; on two machines torchrun finds it out.
                *("--rdzv-conf", f"is_host={int(i == 0)}"),
                *PROGRAM,
                *(f"--{dim}", "2"),
            ]
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment(cable),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        try:
            said = [process.communicate(timeout=200) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, (_, errors) in zip(processes, said, strict=True):
            assert process.returncode == 0, errors[-3000:]
        assert losses("".join(out for out, _ in said)) == pytest.approx(alone, abs=2e-4)
