"""How a streamed weight leaves memory: looked at for edits by the kernel or another thread."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from threaded import in_a_child

import diskoffload
from diskoffload.residency import held as held_module
from diskoffload.residency import streaming
from diskoffload.store import pieces
from diskoffload.store.fills import Check
from diskoffload.system.write_watch import write_watch

LAYERS, WIDTH = 24, 512  # 1 MiB each
BUDGET_BYTES = 12 << 20


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernel tell of no edits, as most containers' and older ones do not."""
    monkeypatch.setattr(streaming, "write_watch", lambda: None)


@pytest.fixture
def told() -> None:
    """Leave out what needs a kernel that tells of edits."""
    if write_watch() is None:
        pytest.skip("this kernel does not tell what was written to (Linux 6.7 and userfaultfd)")


both = pytest.mark.parametrize("found", ["told", "digested"])


def opened(folder: Path) -> tuple[torch.nn.Sequential, Any]:
    """Make a checkpoint of twice the budget; give its model in memory, and streamed."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    (folder / "c").mkdir()
    save_file(plain.state_dict(), folder / "c" / "model.safetensors")
    with torch.device("meta"):
        bare = torch.nn.Sequential(
            *(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        )
    model = diskoffload.open_checkpoint(
        folder / "c", model=bare, offload_dir=folder / "o", max_memory=BUDGET_BYTES, mode="streamed"
    )
    return plain, model


def sums(model: Any) -> list[float]:
    return [float(layer.weight.detach().double().sum()) for layer in model]


def made_later(residency: Any, monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """Have no thread look for edits; give the looks that are asked for, for the test to run."""
    made: list[Check] = []

    def later(data: memoryview, when_known: Any) -> Check:
        made.append(Check(data, when_known))
        return made[-1]

    monkeypatch.setattr(residency._streaming, "check", later)
    return made


@pytest.mark.usefixtures("digested")
def test_who_computes_digests_next_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = opened(tmp_path)
    digested: list[int] = []
    digest_of = held_module.digest_of

    def counted(tensor: torch.Tensor) -> bytes:
        digested.append(threading.get_ident())
        return digest_of(tensor)

    monkeypatch.setattr(held_module, "digest_of", counted)
    for _ in range(4):
        assert sums(model) == sums(plain)
    residency = model[0]._parameters.residency
    assert residency.loaded_count > 3 * LAYERS // 2
    assert residency.loaded_bytes <= BUDGET_BYTES
    # Where the readers are late it is made at once; each that left would be one without them.
    assert digested.count(threading.get_ident()) <= residency.loaded_count // 3


@pytest.mark.usefixtures("told")
def test_nothing_is_digested_where_the_kernel_tells_of_edits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = opened(tmp_path)

    def refuse(data: object) -> bytes:
        raise AssertionError(f"{data} was digested")

    monkeypatch.setattr(held_module, "digest_of", refuse)
    monkeypatch.setattr(pieces.xxhash, "xxh3_128_digest", refuse)
    for _ in range(4):
        assert sums(model) == sums(plain)
    residency = model[0]._parameters.residency
    assert residency.loaded_count > 3 * LAYERS // 2
    assert residency.loaded_bytes <= BUDGET_BYTES


@pytest.mark.usefixtures("told")
def test_what_the_kernel_tells_nothing_of_leaves_at_once(tmp_path: Path) -> None:
    plain, model = opened(tmp_path)
    residency = model[0]._parameters.residency
    held = dict(model[3]._parameters.held_items())["weight"]
    model[3].weight.data.add_(1)
    assert residency.begin_release(held) == WIDTH * WIDTH * 4
    assert held.state is held_module.State.FRESH
    assert torch.equal(model[3].weight, plain[3].weight + 1)  # type: ignore[operator]
    held = dict(model[4]._parameters.held_items())["weight"]
    model[4].weight  # noqa: B018 - reads it
    assert residency.begin_release(held) == WIDTH * WIDTH * 4
    assert held.state is held_module.State.VACANT


@pytest.mark.usefixtures("told")
def test_another_memory_that_was_put_beneath_is_an_edit(tmp_path: Path) -> None:
    plain, model = opened(tmp_path)
    weight = model[3].weight
    weight.data = weight.data.clone().mul_(3)
    del weight
    sums(model)
    sums(model)
    assert torch.equal(model[3].weight, plain[3].weight * 3)  # type: ignore[operator]


@both
def test_a_forked_child_reads_all_of_it_within_the_budget(
    tmp_path: Path, request: pytest.FixtureRequest, found: str
) -> None:
    """It is told of no edits: what its parent had read is compared with the file as it leaves."""
    request.getfixturevalue(found)
    plain, model = opened(tmp_path)
    sums(model)
    with torch.no_grad():
        model[5].weight.mul_(2)
    wanted = sums(plain)
    wanted[5] *= 2
    residency = model[0]._parameters.residency
    entries = [dict(layer._parameters.held_items())["weight"] for layer in model]
    loaded = [one for one in entries if one.state is held_module.State.LOADED]
    of_parent = [one for one in loaded if one is not entries[5]]  # a child writes no edits
    assert len(of_parent) > 4

    def read() -> None:
        torch.set_num_threads(1)  # those of the parent are not here
        assert all(residency.release(one) for one in of_parent[:2])
        assert of_parent[0].state is of_parent[1].state is held_module.State.VACANT
        for _ in range(2):
            assert sums(model) == wanted
            assert residency.loaded_bytes <= BUDGET_BYTES
        # Memory that was the parent's is not watched here, so not each of them need be marked.
        assert any(one.is_marked for one in entries) == (found == "told")

    in_a_child(read)
    assert sums(model) == wanted


@both
def test_edits_of_a_model_larger_than_the_budget_are_seen_at_every_pass(
    tmp_path: Path, request: pytest.FixtureRequest, found: str
) -> None:
    request.getfixturevalue(found)
    plain, model = opened(tmp_path)
    for _ in range(3):
        for layer, other in zip(model, plain, strict=True):
            layer.weight.data.mul_(2)
            other.weight.data.mul_(2)  # type: ignore[operator, union-attr]
        assert sums(model) == sums(plain)


@pytest.mark.usefixtures("digested")
def test_what_is_read_again_while_it_is_looked_at_may_be_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = opened(tmp_path)
    residency = model[0]._parameters.residency
    made = made_later(residency, monkeypatch)
    model[3].weight  # noqa: B018 - reads it
    held = dict(model[3]._parameters.held_items())["weight"]
    assert residency.begin_release(held) == WIDTH * WIDTH * 4
    made[0].run()  # it was as it had been filled
    model[3].weight.data.add_(1)
    assert residency.release(held)
    assert held.state is not held_module.State.VACANT
    assert torch.equal(model[3].weight, plain[3].weight + 1)  # type: ignore[operator]
    model[3]._parameters.sync()
    assert torch.equal(model[3].weight, plain[3].weight + 1)  # type: ignore[operator]


@pytest.mark.usefixtures("digested")
def test_what_somebody_knows_weakly_is_not_looked_at_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has a weak reference gets the object without asking, and could edit it after the look."""
    plain, model = opened(tmp_path)
    residency = model[0]._parameters.residency
    made = made_later(residency, monkeypatch)
    ref = weakref.ref(model[3].weight)
    held = dict(model[3]._parameters.held_items())["weight"]
    weight = ref()
    assert weight is not None
    weight.data.add_(1)
    del weight
    residency.begin_release(held)
    assert not made
    assert held.check is None
    assert torch.equal(model[3].weight, plain[3].weight + 1)  # type: ignore[operator]


@both
def test_what_leaves_is_spread_evenly_over_a_pass(
    tmp_path: Path, request: pytest.FixtureRequest, found: str
) -> None:
    request.getfixturevalue(found)
    _, model = opened(tmp_path)
    for _ in range(4):
        sums(model)
    held = [dict(layer._parameters.held_items())["weight"] for layer in model]
    kept = [one.state is held_module.State.LOADED for one in held]
    runs = "".join("x" if one else " " for one in kept[2:-4]).split("x")
    assert max(map(len, runs)) <= 4, kept


@both
def test_the_same_bytes_written_again_are_no_edit(
    tmp_path: Path, request: pytest.FixtureRequest, found: str
) -> None:
    request.getfixturevalue(found)
    plain, model = opened(tmp_path)
    for _ in range(2):
        for layer in model:
            layer.weight.data.mul_(1)
    model[0]._parameters.sync()
    assert sums(model) == sums(plain)
    assert not list((tmp_path / "o").glob("*.safetensors"))


def test_weights_are_right_until_the_interpreter_has_ended(tmp_path: Path) -> None:
    """What was read by a function that runs at exit was whatever lay in the buffer."""
    script = f"""
import atexit, sys
box = {{}}
def late():
    plain, model = box["models"]
    wrong = [n for n in range(len(plain)) if not plain[n].weight.equal(model[n].weight)]
    print("wrong:", wrong)
atexit.register(late)  # before the library is imported, so that it runs after all of its own
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from pathlib import Path
from test_streamed_leaving import opened, sums
box["models"] = opened(Path({str(tmp_path)!r}))
sums(box["models"][1])
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert (run.returncode, run.stdout.strip()) == (0, "wrong: []"), run.stderr


@pytest.mark.parametrize("mode", ["mapped", "streamed"])
@torch.no_grad()
def test_a_conjugate_that_is_given_as_the_value_is_saved(tmp_path: Path, mode: Any) -> None:
    value = torch.randn(512, 512, dtype=torch.complex64)
    save_file({"weight": value}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        bare = torch.nn.Linear(512, 512, bias=False, dtype=torch.complex64)
    model: Any = diskoffload.open_checkpoint(
        tmp_path, model=bare, offload_dir=tmp_path / "o", max_memory=8 << 20, mode=mode
    )
    model.weight.data = model.weight.data.conj()
    diskoffload.save_checkpoint(model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")["weight"]
    assert torch.equal(saved, value.conj().resolve_conj())
    assert torch.equal(copy.deepcopy(model).weight.resolve_conj(), saved)
