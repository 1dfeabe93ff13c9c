"""Signals that come while the main thread is in C++ code: answered in a line, by commands and by what starts them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.test_commands import free_port
from tests.test_ending import LAUNCHER, gone, job

# A store that nobody opens: the constructor waits in C++ and takes up its wait again after a signal.
WAITING = """
import datetime, os, sys
from minitron_megatron import ending
ending.Listener.__init__.__defaults__ = (1.0,)
from torch.distributed import TCPStore
with __import__("minitron_megatron.cli.main", fromlist=["x"]).ends_in_one_line():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print("waits", flush=True)
    store.wait(["never"], datetime.timedelta(minutes=5))
"""


@pytest.mark.parametrize(
    ("number", "name", "status"),
    [
        (signal.SIGINT, "Ctrl-C", 130),
        (signal.SIGHUP, "SIGHUP", 129),
        (signal.SIGTERM, "SIGTERM", 143),
        (signal.SIGUSR1, "SIGUSR1", 75),
    ],
)
def test_a_command_that_waits_for_others_ends_when_it_is_asked(number, name, status):
    running = subprocess.Popen(
        [sys.executable, "-c", WAITING], env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    with gone(running):
        assert running.stdout.readline() == "waits\n"
        running.send_signal(number)
        said = running.communicate(timeout=60)[1]
    assert (running.returncode, len(said.splitlines())) == (status, 1) and said.startswith(f"stopped by {name}"), said


def test_a_handler_that_runs_is_the_only_answer_and_children_leave_the_parent_alone():
    script = """
import os, signal, time
from minitron_megatron.unheard import Listener
seen = []
def handler(number, frame):
    listener.heard()
    seen.append("handler")
listener = Listener(handler, lambda number: seen.append("answer"), 0.3)
signal.signal(signal.SIGTERM, handler)
os.kill(os.getpid(), signal.SIGTERM)
child = os.fork()
if child == 0:
    signal.signal(signal.SIGUSR1, lambda *_: None)
    os.kill(os.getpid(), signal.SIGUSR1)
    os._exit(0)
os.waitpid(child, 0)
time.sleep(1.1)  # what was heard a moment ago may have been this signal
signal.signal(signal.SIGUSR1, lambda *_: None)  # another handler, which takes its time
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.6)
print(seen)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "['handler']\n"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_launcher_that_waits_for_other_nodes_ends_when_it_is_asked(number, status):
    meet = ["--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    running = job([*LAUNCHER, *meet, "--master-port", str(free_port())], ["-m", "minitron_megatron", "prune"])
    with gone(running):
        time.sleep(12)
        assert running.poll() is None
        os.killpg(running.pid, number)
        said = running.communicate(timeout=60)[1].splitlines()
    assert running.returncode == status and len(said) == 1 and said[0].startswith("stopped by "), said
