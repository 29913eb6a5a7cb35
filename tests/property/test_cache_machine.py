"""Whatever is done to it, a module on disk is seen to be what a plain module is."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from garbage import check_no_garbage
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pair import ENTRIES, WAYS, Pair, at, edit, laid_out, put, seen_as, value_of

import diskoffload
from diskoffload.residency import resident, window

FAST = settings(
    max_examples=15,
    stateful_step_count=30,
    deadline=None,
    database=None,
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
MORE = settings(FAST, max_examples=150, stateful_step_count=60)
# All four ways take ten minutes of a processor; the full form more than half an hour, and its
# examples are others each time.
IS_FULL = os.environ.get("DISKOFFLOAD_TESTS") == "full"
LONG = settings(MORE, max_examples=1500 if IS_FULL else 350, derandomize=False, print_blob=True)
LONG_SEED = 20_261

entries = st.sampled_from(ENTRIES)
some = st.integers(0, 1000)  # which of the tensors that are held, whose number varies
numbers = st.integers(0, 5)
shapes = st.sampled_from([(40, 40), (6, 4), (4, 6), (5,), (), (0,), (3, 0), (2, 3, 4), (1, 24)])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
layouts = st.sampled_from(["plain", "plain", "transposed", "every second", "expanded"])
forms = st.sampled_from(["itself", "data", "detached", "view", "flat", "transposed", "numpy"])
edits = st.sampled_from(["add", "fill", "zero", "first", "last", "copy"])
evictions = st.sampled_from(["make_room", "release", "sync", "gc"])


class CacheMachine(RuleBasedStateMachine):
    """Does the same to both modules of a pair, and compares them after every step."""

    def __init__(self, way: str, folder: Path) -> None:
        super().__init__()
        self.way = way
        self.threads = set(threading.enumerate())
        self.place = tempfile.TemporaryDirectory(dir=folder)
        self.folder = Path(self.place.name)
        self.contexts: list[ExitStack] = []
        self.graphs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.unseen_steps = 0
        self.pair: Any = None

    @initialize(
        group_bytes=st.sampled_from([1, 4 << 10, 1 << 20]),
        max_bytes=st.sampled_from([1, 16 << 10, 1 << 30]),
    )
    def start(self, group_bytes: int, max_bytes: int) -> None:
        self.pair = Pair(self.way, self.folder, group_bytes, max_bytes)

    # A reopening of the folder belongs here as soon as there is one: sync, drop the model,
    # open the folder again, and go on with what was read from it.

    # ------------------------------------------------------------------ assigning

    @rule(
        entry=entries,
        shape=shapes,
        dtype=dtypes,
        layout=layouts,
        seed=numbers,
        kind=st.sampled_from(["parameter", "frozen", "tensor", "buffer", "lost buffer", "mapping"]),
        keep=st.booleans(),
    )
    def assign(
        self, entry: Any, shape: Any, dtype: Any, layout: str, seed: int, kind: str, keep: bool
    ) -> None:
        part, name = entry

        def action(root: Any) -> Any:
            module = getattr(root, part)
            value = laid_out(value_of(shape, dtype, seed), layout).to(self.pair.device)
            if kind in ("parameter", "frozen"):
                wants_grad = kind == "parameter" and dtype.is_floating_point
                value = torch.nn.Parameter(value, requires_grad=wants_grad)
            if kind in ("buffer", "lost buffer"):
                module.register_buffer(name, value, persistent=kind == "buffer")
            elif kind == "mapping":  # as libraries do that go around ``__setattr__``
                mapping = module._buffers if name in module._buffers else module._parameters
                mapping[name] = value
            else:
                setattr(module, name, value)
            return value

        made = self.pair.both(action)
        if keep:
            self.pair.keep(made)

    @rule(entry=entries)
    def assign_none(self, entry: Any) -> None:
        self.pair.both(lambda root: put(root, entry, None))

    @rule(entry=entries)
    def delete(self, entry: Any) -> None:
        self.pair.both(lambda root: delattr(getattr(root, entry[0]), entry[1]))

    @rule(entry=entries, which=some)
    def assign_a_held_tensor(self, entry: Any, which: int) -> None:
        if self.pair.kept:
            mine, theirs = self.pair.kept[which % len(self.pair.kept)]
            if mine.device != self.pair.device:
                return  # it would move there when it is read, as a plain one's does not
            self.pair.both(
                lambda root: put(root, entry, mine if root is self.pair.held else theirs)
            )

    # ------------------------------------------------------------------ ties

    @rule(
        entry=entries,
        other=entries,
        how=st.sampled_from(["read", "offloaded", "memory", "rows", "columns"]),
    )
    def tie(self, entry: Any, other: Any, how: str) -> None:
        if self.way == "elsewhere" and how != "offloaded":
            how = "read"  # its first read moves it: what was kept of it before stays behind

        def action(root: Any) -> None:
            if how == "offloaded":  # what is put in is what stands for the entry
                at(root, entry)  # one that is absent stays absent
                with diskoffload.disable_onloading():
                    value = at(root, other)
                    put(root, entry, value)
                return
            value = at(root, other)
            if how != "read":  # another object over the same memory, or over a part of it
                part = {"memory": ..., "rows": slice(1, 4), "columns": (..., slice(3))}[how]
                part = value.data[part]
                value = torch.nn.Parameter(part, False) if entry[1] in "wu" else part
            put(root, entry, value)

        self.pair.both(action)

    @rule(entry=entries)
    @torch.no_grad()
    def untie(self, entry: Any) -> None:
        def action(root: Any) -> None:
            value = at(root, entry)
            other = value.clone()
            is_parameter = isinstance(value, torch.nn.Parameter)
            made = torch.nn.Parameter(other, value.requires_grad) if is_parameter else other
            put(root, entry, made)

        self.pair.both(action)

    # ------------------------------------------------------------------ changing in place

    @rule(entry=entries, form=forms, how=edits, number=numbers)
    @torch.no_grad()
    def edit_entry(self, entry: Any, form: str, how: str, number: int) -> None:
        self.pair.both(lambda root: edit(seen_as(at(root, entry), form), how, number))

    @rule(which=some, form=forms, how=edits, number=numbers)
    @torch.no_grad()
    def edit_a_held_tensor(self, which: int, form: str, how: str, number: int) -> None:
        if self.pair.kept:
            mine, theirs = self.pair.kept[which % len(self.pair.kept)]
            self.pair.both(
                lambda root: edit(
                    seen_as(mine if root is self.pair.held else theirs, form), how, number
                )
            )

    @rule(
        entry=entries,
        source=st.one_of(shapes, entries.map(lambda entry: ("entry", *entry))),
        number=numbers,
    )
    def update(self, entry: Any, source: Any, number: int) -> None:
        part, name = entry

        def action(root: Any) -> None:
            if source[:1] == ("entry",):
                data = at(root, source[1:])
            else:
                data = value_of(source, torch.float32, number)
            diskoffload.update_offload_parameter(getattr(root, part), name, data)
            if source[:1] != ("entry",):
                data.fill_(6)  # the value was taken at the call

        self.pair.both(action)

    @rule(entry=entries, shape=shapes, dtype=dtypes, layout=layouts, seed=numbers)
    def set_data(self, entry: Any, shape: Any, dtype: Any, layout: str, seed: int) -> None:
        def action(root: Any) -> None:
            value = laid_out(value_of(shape, dtype, seed), layout).to(self.pair.device)
            at(root, entry).data = value

        self.pair.both(action)

    @rule(part=st.sampled_from(["one", "two", ""]), dtype=st.sampled_from(["float", "bfloat16"]))
    def convert(self, part: str, dtype: str) -> None:
        self.pair.both(lambda root: getattr(root.get_submodule(part), dtype)() and None)

    @rule(entry=entries, wanted=st.booleans())
    def require_grad(self, entry: Any, wanted: bool) -> None:
        if not any(theirs._is_view() for _, theirs in self.pair.kept):
            self.pair.both(lambda root: at(root, entry).requires_grad_(wanted))

    # ------------------------------------------------------------------ autograd

    @rule(entry=entries)
    def forward(self, entry: Any) -> None:
        graphs = self.pair.both(lambda root: at(root, entry).square().sum())
        if graphs[0] is not None:
            self.graphs.append(graphs)

    @precondition(lambda self: self.graphs)
    @rule()
    def backward(self) -> None:
        mine, theirs = self.graphs.pop()
        self.pair.both(lambda root: (mine if root is self.pair.held else theirs).backward())

    # ------------------------------------------------------------------ reading, leaving

    @rule(entry=entries, form=forms)
    @torch.no_grad()
    def read_and_hold(self, entry: Any, form: str) -> None:
        if self.way == "elsewhere":
            form = "itself"  # its first read moves it: what was kept of it before stays behind
        self.pair.keep(self.pair.both(lambda root: seen_as(at(root, entry), form)))

    @rule(which=some, all_of_them=st.booleans())
    def let_go(self, which: int, all_of_them: bool) -> None:
        if all_of_them:
            self.pair.kept.clear()
            self.graphs.clear()
            self.pair.retired.clear()
        elif self.pair.kept:
            del self.pair.kept[which % len(self.pair.kept)]

    @rule(how=evictions)
    def evict(self, how: str) -> None:
        self.pair.evict(how)

    @rule()
    def enter(self) -> None:
        self.contexts.append(ExitStack())
        self.contexts[-1].enter_context(diskoffload.disable_offloading())

    @precondition(lambda self: self.contexts)
    @rule()
    def leave(self) -> None:
        self.contexts.pop().close()

    @rule(keep_original=st.booleans())
    def deepcopy(self, keep_original: bool) -> None:
        self.pair.copy(keep_original)

    @rule(steps=st.integers(1, 5))
    def look_away(self, steps: int) -> None:
        """Compare nothing for some steps: comparing reads, and reading brings things back."""
        self.unseen_steps = steps

    # ------------------------------------------------------------------ comparing

    @invariant()
    def is_what_the_plain_one_is(self) -> None:
        if self.pair is None:
            return
        self.pair.wait_for_the_writer()
        if self.unseen_steps:
            self.unseen_steps -= 1
        else:
            self.pair.compare()

    def teardown(self) -> None:
        try:
            while self.contexts:
                self.contexts.pop().close()
            if self.pair is not None:
                self.pair.compare()
                self.pair = None
                self.graphs.clear()
                if sys.exc_info()[0] is None:  # else a traceback holds what there was
                    check_no_garbage(self.folder, self.threads)
        finally:
            self.pair = None
            self.place.cleanup()


@pytest.fixture(autouse=True)
def collect_when_told() -> Iterator[None]:
    """Have no collection but those that are steps, so that the same steps give the same again."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have mapped tensors looked at again as early as if they were large."""
    monkeypatch.setattr(resident, "_LEAST_WINDOW_BYTES", 1)
    monkeypatch.setattr(window, "_GROWTH_BYTES", 0)


@pytest.mark.parametrize("way", WAYS)
def test_fast(way: str, tmp_path: Path) -> None:
    run_state_machine_as_test(lambda: CacheMachine(way, tmp_path), settings=FAST)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", WAYS)
def test_more(way: str, tmp_path: Path) -> None:
    run_state_machine_as_test(lambda: CacheMachine(way, tmp_path), settings=MORE)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", WAYS)
def test_long(way: str, tmp_path: Path) -> None:
    def machine() -> CacheMachine:
        return CacheMachine(way, tmp_path)

    if not IS_FULL:
        print(f"seed {LONG_SEED}, {LONG.max_examples} examples; DISKOFFLOAD_TESTS=full: all")
        machine = seed(LONG_SEED)(machine)
    run_state_machine_as_test(machine, settings=LONG)
