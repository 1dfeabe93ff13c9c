"""What a process may use: the machine's, less what its control groups leave it, in version 1 and 2, however deep in them."""

import math

import pytest

from minitron_megatron.machine import free_gib, usable_cores

TREES = {
    "second": ("0::{path}\n", "{path}"),
    "first": ("7:cpu,cpuacct:{path}\n4:memory:{path}\n0::/\n", "{name}{path}"),
}


def groups(tmp_path, tree, name, path):
    """(root of the tree, file that says where this process is, the folder of its group for a resource)."""
    of_process, of_group = TREES[tree]
    own = tmp_path / "own"
    own.write_text(of_process.format(path=path))
    root = tmp_path / "root"
    group = root / of_group.format(name=name, path=path).lstrip("/")
    group.mkdir(parents=True, exist_ok=True)
    return root, own, group


def limit_cores(group, tree, quota):
    if tree == "second":
        (group / "cpu.max").write_text(f"{quota if quota > 0 else 'max'} 100000\n")
    else:
        (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (group / "cpu.cfs_period_us").write_text("100000\n")


def limit_memory(group, tree, gib, used):
    second = tree == "second"
    names = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    none = "max" if second else str(2**63 - 4096)
    (group / names[0]).write_text(f"{none if gib is None else gib * 2**30}\n")
    (group / names[1]).write_text(f"{used * 2**30}\n")
    total = "" if second else "total_"
    (group / "memory.stat").write_text(f"anon 1\n{total}inactive_file {2**30}\n{total}active_file {2**30}\n")


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("path", ["/", "/job_7", "/job_7/step_0/task $(x)"])
@pytest.mark.parametrize(("quota", "cores"), [(150000, 2), (200000, 2), (200001, 3), (1000, 1), (-1, 99)])
def test_cores_are_those_that_the_control_group_gives(tmp_path, monkeypatch, tree, path, quota, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(99)))
    root, own, group = groups(tmp_path, tree, "cpu", path)
    limit_cores(group, tree, quota)
    assert usable_cores(root, own) == cores
    assert usable_cores(tmp_path / "nowhere", tmp_path / "nowhere") == 99


@pytest.mark.parametrize("tree", TREES)
def test_a_group_above_limits_too(tmp_path, monkeypatch, tree):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(99)))
    root, own, inner = groups(tmp_path, tree, "cpu", "/job/step")
    limit_cores(inner, tree, 700000)
    limit_cores(inner.parent, tree, 400000)
    assert usable_cores(root, own) == 4


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("path", ["/", "/job_7/step_0"])
def test_free_memory_is_what_machine_and_control_group_leave(tmp_path, tree, path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 99 kB\nMemAvailable: {8 * 2**20} kB\n")
    root, own, group = groups(tmp_path, tree, "memory", path)
    assert free_gib(root, own, meminfo) == 8
    assert math.isinf(free_gib(root, own, tmp_path / "nowhere"))
    limit_memory(group, tree, 6, 5)
    # What files left in memory can be taken.
    assert free_gib(root, own, meminfo) == 3
    limit_memory(group, tree, None, 5)
    assert free_gib(root, own, meminfo) == 8


@pytest.mark.parametrize("said", ["", "no colon", "0::/../../etc", "4:memory:/elsewhere/on/the/host", "\udc80"])
def test_what_does_not_say_where_it_is_counts_as_the_root(tmp_path, said):
    own, root = tmp_path / "own", tmp_path / "root"
    own.write_bytes(said.encode("utf-8", "surrogateescape"))
    root.mkdir()
    limit_memory(root, "second", 6, 5)
    assert free_gib(root, own, tmp_path / "nowhere") == 3
