"""Headroom on recorded trees of control groups."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from diskoffload.errors import InvalidInputError
from diskoffload.system.headroom import Headroom, MachineMemory

MIB = 1 << 20
GIB = 1 << 30
V1_UNLIMITED = 9223372036854771712
MACHINE = MachineMemory(total_bytes=64 * GIB, available_bytes=32 * GIB)

V1_MOUNT = "35 31 0:32 {root} {point} rw,relatime shared:9 - cgroup cgroup rw,memory"
V2_MOUNT = "42 32 0:26 {root} {point} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_POINT = "/sys/fs/cgroup/memory"
V2_POINT = "/sys/fs/cgroup"


class Tree:
    """Recorded ``/proc`` and ``/sys`` below a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.sys = folder / "sys"

    def membership(self, text: str) -> None:
        self._write(self.proc / "self" / "cgroup", text)

    def mounts(self, *lines: str) -> None:
        self._write(self.proc / "self" / "mountinfo", "\n".join(lines) + "\n")

    def v1(self, path: str, limit: int, usage: int, *, hierarchy: int = 1, **stat: int) -> Path:
        return self._group(
            f"fs/cgroup/memory/{path}",
            {
                "memory.limit_in_bytes": limit,
                "memory.usage_in_bytes": usage,
                "memory.use_hierarchy": hierarchy,
            },
            stat,
        )

    def v2(self, path: str, limit: int | str, usage: int, **stat: int) -> Path:
        files = {"memory.max": limit, "memory.high": stat.pop("high", "max")}
        return self._group(f"fs/cgroup/{path}", {**files, "memory.current": usage}, stat)

    def headroom(self, machine: MachineMemory = MACHINE) -> Headroom:
        return Headroom(refresh_seconds=0, proc=self.proc, sys=self.sys, machine=lambda: machine)

    def _group(self, path: str, files: dict[str, int | str], stat: dict[str, int]) -> Path:
        directory = self.sys / path
        for name, value in files.items():
            self._write(directory / name, f"{value}\n")
        self._write(directory / "memory.stat", "".join(f"{k} {v}\n" for k, v in stat.items()))
        return directory

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_v1_in_a_container_that_sees_the_hosts_paths(tree: Tree) -> None:
    # Docker on version 1: the mount shows only the container's own subtree.
    tree.membership("11:cpuset:/docker/ab12\n4:cpu,memory:/docker/ab12\n0::/docker/ab12\n")
    tree.mounts(V1_MOUNT.format(root="/docker/ab12", point=V1_POINT))
    tree.v1("", 4 * GIB, 3 * GIB, total_inactive_file=GIB, total_active_file=GIB // 2)
    headroom = tree.headroom()
    assert headroom.available_bytes() == 2 * GIB + GIB // 2
    assert headroom.limit_bytes() == 4 * GIB
    assert headroom.explain() == f"cgroup {tree.sys}/fs/cgroup/memory"


def test_v1_only_clean_file_pages_of_the_whole_subtree_are_free(tree: Tree) -> None:
    tree.membership("4:memory:/\n")
    tree.mounts(V1_MOUNT.format(root="/", point=V1_POINT))
    tree.v1(
        "",
        1000 * MIB,
        900 * MIB,
        # The group's own pages, its shared memory and locked pages: none of it counts.
        cache=800 * MIB,
        inactive_file=7 * MIB,
        active_file=7 * MIB,
        total_shmem=200 * MIB,
        total_unevictable=100 * MIB,
        total_mapped_file=300 * MIB,
        total_inactive_file=300 * MIB,
        total_active_file=100 * MIB,
        total_dirty=30 * MIB,
        total_writeback=20 * MIB,
    )
    assert tree.headroom().available_bytes() == (100 + 400 - 50) * MIB


def test_v2_counts_the_same_and_heeds_memory_high(tree: Tree) -> None:
    tree.membership("0::/\n")
    tree.mounts(V2_MOUNT.format(root="/", point=V2_POINT))
    stat = {
        "file": 700 * MIB,
        "shmem": 100 * MIB,
        "unevictable": 50 * MIB,
        "inactive_file": 300 * MIB,
        "active_file": 200 * MIB,
        "file_dirty": 40 * MIB,
        "file_writeback": 10 * MIB,
    }
    tree.v2("", 1000 * MIB, 900 * MIB, **stat)
    assert tree.headroom().available_bytes() == (100 + 500 - 50) * MIB
    tree.v2("", 1000 * MIB, 900 * MIB, high=950 * MIB, **stat)
    assert tree.headroom().available_bytes() == (50 + 500 - 50) * MIB
    assert tree.headroom().limit_bytes() == 950 * MIB


@pytest.mark.parametrize("tight", ["pod", "pod/app", "", "pod/app/worker"])
def test_the_tightest_level_binds_whichever_it_is(tree: Tree, tight: str) -> None:
    tree.membership("0::/pod/app/worker\n")
    tree.mounts(V2_MOUNT.format(root="/", point=V2_POINT))
    for level in ["", "pod", "pod/app", "pod/app/worker"]:
        tree.v2(level, 8 * GIB, GIB)
    directory = tree.v2(tight, 2 * GIB, GIB)
    tree.v2("pod/other", GIB, GIB)  # does not enclose us
    headroom = tree.headroom()
    assert headroom.available_bytes() == GIB
    assert headroom.limit_bytes() == 2 * GIB
    assert headroom.explain() == f"cgroup {directory}"


def test_the_least_room_binds_not_the_least_limit(tree: Tree) -> None:
    tree.membership("0::/a/b\n")
    tree.mounts(V2_MOUNT.format(root="/", point=V2_POINT))
    parent = tree.v2("a", 8 * GIB, 7 * GIB, inactive_file=GIB // 2)
    tree.v2("a/b", 4 * GIB, GIB)
    headroom = tree.headroom()
    assert headroom.available_bytes() == GIB + GIB // 2
    assert headroom.limit_bytes() == 4 * GIB
    assert headroom.explain() == f"cgroup {parent}"


@pytest.mark.parametrize("limit", ["max", 500 * GIB])
def test_the_machine_binds_where_no_group_is_tighter(tree: Tree, limit: int | str) -> None:
    tree.membership("0::/a\n")
    tree.mounts(V2_MOUNT.format(root="/", point=V2_POINT))
    tree.v2("a", limit, 5 * GIB)
    headroom = tree.headroom()
    assert headroom.available_bytes() == MACHINE.available_bytes
    assert headroom.limit_bytes() == MACHINE.total_bytes
    assert headroom.explain() == "machine"


def test_v1_without_a_limit_is_no_limit_even_on_an_absurdly_large_machine(tree: Tree) -> None:
    tree.membership("4:memory:/a\n")
    tree.mounts(V1_MOUNT.format(root="/", point=V1_POINT))
    tree.v1("a", V1_UNLIMITED, 5 * GIB)
    tree.v1("", 9223372036854710272, 5 * GIB)  # "no limit" with pages of 64 KiB
    machine = MachineMemory(1 << 63, 1 << 63)
    assert tree.headroom(machine).available_bytes() == 1 << 63


def test_hybrid_reads_both_versions(tree: Tree) -> None:
    tree.membership("4:memory:/app\n1:name=systemd:/\n0::/app\n")
    tree.mounts(
        "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755",
        V1_MOUNT.format(root="/", point=V1_POINT),
        V2_MOUNT.format(root="/", point="/sys/fs/cgroup/unified"),
        "garbage",
    )
    tree.v1("app", 3 * GIB, GIB)
    (tree.sys / "fs/cgroup/unified/app").mkdir(parents=True)
    assert tree.headroom().available_bytes() == 2 * GIB
    tree.v2("unified/app", 2 * GIB, GIB)
    assert tree.headroom().available_bytes() == GIB


def test_v1_groups_that_do_not_charge_upwards_are_where_the_walk_ends(tree: Tree) -> None:
    tree.membership("4:memory:/a/b\n")
    tree.mounts(V1_MOUNT.format(root="/", point=V1_POINT))
    tree.v1("a", GIB, GIB, hierarchy=0)
    tree.v1("a/b", 3 * GIB, GIB)
    assert tree.headroom().available_bytes() == 2 * GIB
    tree.v1("a", GIB, GIB, hierarchy=1)
    assert tree.headroom().available_bytes() == 0


@pytest.mark.parametrize(
    ("path", "root", "binds"),
    [
        ("/", "/", "."),
        ("/sub", "/", "sub"),
        ("/docker/ab/sub", "/docker/ab", "sub"),
        ("/", "/..", "."),  # the mount's root encloses our namespace by an unknown name
        ("/sub", "/../..", "."),
        ("/../sibling/x", "/..", "sibling/x"),
        ("/../x", "/../..", "."),
    ],
)
def test_namespaces_and_subtree_mounts(tree: Tree, path: str, root: str, binds: str) -> None:
    tree.membership(f"0::{path}\n")
    tree.mounts(V2_MOUNT.format(root=root, point=V2_POINT))
    tree.v2(binds, 3 * GIB, GIB)
    assert tree.headroom().available_bytes() == 2 * GIB


@pytest.mark.parametrize(
    ("path", "root"),
    [("/docker/ab", "/docker/abc"), ("/../x", "/"), ("/a", "/../b"), ("/../../x", "/..")],
)
def test_a_mount_that_does_not_show_our_group_says_nothing(
    tree: Tree, path: str, root: str
) -> None:
    tree.membership(f"0::{path}\n")
    tree.mounts(V2_MOUNT.format(root=root, point=V2_POINT))
    tree.v2("", GIB, GIB)
    tree.v2("c", GIB, GIB)
    tree.v2("x", GIB, GIB)
    tree.v2("../x", GIB, GIB)
    assert tree.headroom().available_bytes() == MACHINE.available_bytes


def test_a_mount_point_with_a_space_and_a_later_mount_over_it(tree: Tree) -> None:
    tree.membership("0::/a:b c\n")
    spaced = V2_MOUNT.format(root="/", point=r"/sys/my\040groups")
    tree.mounts(spaced)
    tree._group("my groups/a:b c", {"memory.max": 3 * GIB, "memory.current": GIB}, {})
    assert tree.headroom().available_bytes() == 2 * GIB
    tree.mounts(spaced, r"50 31 0:40 / /sys/my\040groups rw - tmpfs tmpfs rw")
    assert tree.headroom().available_bytes() == MACHINE.available_bytes


def test_unreadable_and_malformed_files_are_passed_over(tree: Tree) -> None:
    tree.membership("nonsense\n\n0::/a/b\n")
    tree.mounts(V2_MOUNT.format(root="/", point=V2_POINT))
    broken = tree.v2("a/b", "what", GIB)
    parent = tree.v2("a", 4 * GIB, GIB)
    (parent / "memory.stat").write_text("inactive_file many\n\nshmem\n")
    assert tree.headroom().available_bytes() == 3 * GIB
    (broken / "memory.max").write_text("")
    (parent / "memory.current").unlink()
    assert tree.headroom().available_bytes() == MACHINE.available_bytes


@pytest.mark.parametrize(
    ("usage", "stat", "expected"),
    [
        (5 * GIB, {}, 0),
        (GIB, {"inactive_file": 9 * GIB}, 4 * GIB),
        (GIB, {"inactive_file": MIB, "file_dirty": GIB}, 3 * GIB),
    ],
)
def test_never_negative_never_above_the_limit(
    tree: Tree, usage: int, stat: dict[str, int], expected: int
) -> None:
    tree.membership("0::/\n")
    tree.mounts(V2_MOUNT.format(root="/", point=V2_POINT))
    tree.v2("", 4 * GIB, usage, **stat)
    assert tree.headroom().available_bytes() == expected


def test_a_move_to_another_group_and_a_changed_limit_are_noticed(tree: Tree) -> None:
    tree.membership("0::/a\n")
    tree.mounts(V2_MOUNT.format(root="/", point=V2_POINT))
    tree.v2("a", 4 * GIB, GIB)
    tree.v2("b", 2 * GIB, GIB)
    headroom = tree.headroom()
    assert headroom.available_bytes() == 3 * GIB
    tree.membership("0::/b\n")
    assert headroom.available_bytes() == GIB
    tree.v2("b", 9 * GIB, GIB)
    assert headroom.available_bytes() == 8 * GIB


def test_measures_once_within_the_refresh_time(tmp_path: Path) -> None:
    asked: list[int] = []

    def machine() -> MachineMemory:
        asked.append(1)
        return MachineMemory(GIB, len(asked))

    def ask(refresh_seconds: float) -> tuple[Headroom, int]:
        asked.clear()
        headroom = Headroom(
            refresh_seconds=refresh_seconds, proc=tmp_path, sys=tmp_path, machine=machine
        )
        values = {headroom.available_bytes() for _ in range(10)}
        headroom.explain()
        return headroom, len(values)

    assert ask(refresh_seconds=3600)[1] == 1
    assert len(asked) == 1
    assert ask(refresh_seconds=0)[1] == 10
    assert len(asked) == 11
    headroom, _ = ask(refresh_seconds=0.01)
    time.sleep(0.02)
    before = len(asked)
    headroom.available_bytes()
    assert len(asked) == before + 1


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_refuses_a_refresh_time_that_cannot_be_meant(seconds: float) -> None:
    with pytest.raises(InvalidInputError, match="refresh_seconds"):
        Headroom(refresh_seconds=seconds)


def test_many_threads_and_a_moving_group_give_only_true_answers(tree: Tree) -> None:
    tree.mounts(V2_MOUNT.format(root="/", point=V2_POINT))
    tree.v2("a", 4 * GIB, GIB)
    tree.v2("b", 2 * GIB, GIB)
    tree.membership("0::/a\n")
    headroom = tree.headroom()
    seen: set[int] = set()
    failures: list[BaseException] = []
    done = threading.Event()

    def ask() -> None:
        try:
            while not done.is_set():
                seen.add(headroom.available_bytes())
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    staged = tree.proc / "self" / "staged"
    for turn in range(50):
        staged.write_text(f"0::/{'ab'[turn % 2]}\n")
        os.replace(staged, tree.proc / "self" / "cgroup")
        time.sleep(0.001)
    done.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert seen
    assert seen <= {3 * GIB, GIB}
    assert headroom.available_bytes() == GIB
