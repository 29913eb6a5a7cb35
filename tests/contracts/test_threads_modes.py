"""A mode belongs to the thread or task that entered it, and ends with its context."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from threaded import ALL_BYTES, PATIENCE_SECONDS, Shelf, value_of

import diskoffload
from diskoffload import OffloadCache
from diskoffload.residency.held import State


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """A module whose tensors are decoded when they are read, and leave when they may."""
    made = Shelf(tmp_path / "off", compression="zstd")
    made.sync()
    made.evict()
    return made


def may_leave(shelf: Shelf) -> bool:
    """Tell whether the first entry leaves memory when something else wants some."""
    shelf.residency.make_room(0)
    (held,) = [held for held in shelf.residency.entries() if held.name == "e0"]
    return held.state is State.VACANT


def sees_what_is_real(shelf: Shelf) -> bool:
    assert not OffloadCache.offloading_disabled
    assert len(OffloadCache.keep_onloaded_values) == 0
    return not OffloadCache.onloading_disabled and not shelf.module.e0.is_meta


def elsewhere(action: Callable[[], Any]) -> Any:
    """Do something in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(action).result(PATIENCE_SECONDS)


def test_another_thread_sees_no_mode(shelf: Shelf) -> None:
    with diskoffload.disable_onloading(), diskoffload.disable_offloading():
        assert shelf.module.e0.is_meta
        assert elsewhere(lambda: sees_what_is_real(shelf))
    with diskoffload.disable_offloading():
        assert elsewhere(lambda: sees_what_is_real(shelf))
        assert may_leave(shelf)  # only the other thread has read it
        first = shelf.module.e0.data_ptr()
        assert not may_leave(shelf)
        assert shelf.module.e0.data_ptr() == first
    assert may_leave(shelf)


def test_a_thread_that_is_started_within_a_mode_is_not_in_it(shelf: Shelf) -> None:
    seen: list[bool] = []
    with diskoffload.disable_onloading():
        thread = threading.Thread(target=lambda: seen.append(sees_what_is_real(shelf)))
        thread.start()
        thread.join(PATIENCE_SECONDS)
    assert seen == [True]


def test_what_two_threads_keep_stays_until_both_have_ended(shelf: Shelf) -> None:
    read, go_on = threading.Event(), threading.Event()

    def keep() -> None:
        with diskoffload.disable_offloading():
            assert torch.equal(shelf.module.e0, value_of(0, 0))
            read.set()
            assert go_on.wait(PATIENCE_SECONDS)

    with ThreadPoolExecutor(1) as pool:
        with diskoffload.disable_offloading():
            assert torch.equal(shelf.module.e0, value_of(0, 0))
            other = pool.submit(keep)
            assert read.wait(PATIENCE_SECONDS)
        assert not may_leave(shelf)
        go_on.set()
        other.result(PATIENCE_SECONDS)
    assert may_leave(shelf)


def test_modes_nest_and_survive_exceptions(shelf: Shelf) -> None:
    with diskoffload.disable_offloading():
        kept = shelf.module.e0
        with diskoffload.disable_onloading():
            assert shelf.module.e0.is_meta
            with diskoffload.disable_onloading(), diskoffload.disable_offloading():
                assert shelf.module.e0.is_meta
            assert shelf.module.e0.is_meta
        with pytest.raises(ZeroDivisionError), diskoffload.disable_onloading():
            1 / 0  # noqa: B018
        assert shelf.module.e0 is kept
        with pytest.raises(KeyError), diskoffload.disable_offloading():
            raise KeyError
        del kept
        assert not may_leave(shelf)  # an inner context's end is not the outer one's
        assert OffloadCache.offloading_disabled
    assert may_leave(shelf)
    assert sees_what_is_real(shelf)


def test_an_update_within_a_mode_is_seen_by_another_thread(shelf: Shelf) -> None:
    with diskoffload.disable_offloading():
        shelf.change(0, "edit")
        elsewhere(lambda: shelf.read(0))
        shelf.residency.make_room(ALL_BYTES)  # under pressure it leaves, edited or not
        shelf.read(0)
    elsewhere(lambda: shelf.read(0))


def test_tasks_have_modes_of_their_own(shelf: Shelf) -> None:
    async def without_onloading(turns: int) -> None:
        for _ in range(turns):
            with diskoffload.disable_onloading():
                await asyncio.sleep(0)
                assert shelf.module.e0.is_meta
                await asyncio.sleep(0)
                assert OffloadCache.onloading_disabled

    async def plainly(turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
            assert sees_what_is_real(shelf)

    async def keeping(turns: int) -> None:
        for _ in range(turns):
            with diskoffload.disable_offloading():
                await asyncio.sleep(0)
                assert not shelf.module.e0.is_meta
                await asyncio.sleep(0)
                assert len(OffloadCache.keep_onloaded_values) == 1

    async def all_of_them() -> None:
        await asyncio.gather(without_onloading(20), plainly(30), keeping(20), without_onloading(15))

    asyncio.run(all_of_them())
    assert may_leave(shelf)
    assert sees_what_is_real(shelf)


@contextmanager
def a_thread_in_a_mode() -> Iterator[None]:
    """Have some mode entered somewhere: only then does a read ask for its own."""
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with diskoffload.disable_offloading():
            entered.set()
            assert leave.wait(PATIENCE_SECONDS)

    with ThreadPoolExecutor(1) as pool:
        staying = pool.submit(stay)
        assert entered.wait(PATIENCE_SECONDS)
        try:
            yield
        finally:
            leave.set()
            staying.result(PATIENCE_SECONDS)


def outlive(mode: Callable[[], AbstractContextManager[None]], action: Callable[[], None]) -> None:
    """Do something in a task that was started within a mode, after that has ended."""

    async def late(ended: asyncio.Event) -> None:
        await ended.wait()
        action()

    async def main() -> None:
        ended = asyncio.Event()
        with mode():
            task = asyncio.create_task(late(ended))
        ended.set()
        await task

    with a_thread_in_a_mode():
        asyncio.run(main())


def test_a_task_that_outlives_a_mode_reads_what_is_real(shelf: Shelf) -> None:
    def read() -> None:
        assert sees_what_is_real(shelf)

    outlive(diskoffload.disable_onloading, read)


def test_a_task_that_outlives_a_mode_keeps_nothing(shelf: Shelf) -> None:
    def read() -> None:
        assert torch.equal(shelf.module.e0, value_of(0, 0))

    outlive(diskoffload.disable_offloading, read)
    assert may_leave(shelf)
