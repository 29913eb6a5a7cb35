"""What compiled code reads of offloaded modules, and how it keeps that in memory.

Tracing
-------
``torch.compile``, ``torch.export``, ``torch.jit.trace`` and ``torch.fx.symbolic_trace`` take
an offloaded module as it is, before or after it is offloaded, and give what they give for
a plain one. What they have made never asks a cache for a tensor again, so

* compiled code keeps the parameters and buffers of every module that it reads in memory,
  for as long as these are offloaded, also beyond the budget (a warning in the log says
  so). Whatever is mapped costs nothing: a checkpoint opened in the dtype it is stored in,
  or a model offloaded without compression, with the CPU to compute on. A compressed or
  converted model costs the size of all its tensors once it is compiled.
  :func:`release_traced` gives that memory back; the next call of the compiled module loads
  and compiles anew.
* in-place edits, ``update_offload_parameter`` and replaced parameters are seen by compiled
  code, and edits that it makes by the next read and on disk. A parameter of another shape
  or dtype compiles anew, as on a plain module.
* modules of one make (a model's layers) are kept together, so that compiling each of them
  costs one compilation: all of them where that is free, else as many as the budget holds.
* ``disable_onloading`` and ``disable_offloading`` say how Python reads; compiled code heeds
  neither. Entering one of them, assigning a parameter or buffer (``functional_call`` does),
  or offloading inside the compiled function breaks its graph there, and is an error with
  ``fullgraph=True``; the results are right.
* while a module is compiled all its tensors are read once, whatever the function needs. One
  that cannot be read raises torch's ``InternalTorchDynamoError``, which names our own.
* an exported program and a traced script refer to the tensors themselves, which stay in
  memory as long as it lives. Export a module as it is: inside ``disable_onloading`` it is
  refused, because the program would lack its tensors.
* ``torch.fx.symbolic_trace`` keeps calling the offloaded submodules that are leaves of the
  graph, so nothing of them has to stay in memory.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._C._dynamo import eval_frame

from diskoffload.errors import OffloadError, UnsupportedError
from diskoffload.residency.held import Held, State
from diskoffload.residency.objects import uses_of
from diskoffload.residency.resident import Residency
from diskoffload.residency.weak_list import WeakList

if TYPE_CHECKING:
    from diskoffload.cache.base import OffloadCache

_log = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])

# ---------------------------------------------------------------------- how dynamo sees us
# What torch.compiler.disable and torch.jit do to functions is done here by hand: importing
# torch._dynamo takes seconds, and a test of torch.compiler.is_dynamo_compiling() would cost
# every read a twentieth of its time.


def traced_as(substitute: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Have dynamo trace a call of the decorated function as one of the substitute."""

    def mark(function: _Function) -> _Function:
        function._torchdynamo_inline = substitute  # type: ignore[attr-defined]
        return function

    return mark


def keep_dynamo_out(cls: type, *, but: tuple[str, ...] = ()) -> None:
    """Have a class's methods run as they are, and all that they call.

    Dynamo would otherwise compile them as soon as a graph breaks: tens of fragments whose
    guards fail at every call, and use counts that are wrong by the references it adds.

    Args:
        cls: the class.
        but: methods that are traced where the code that calls them is.
    """
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else member
        if isinstance(function, FunctionType):
            _skip_frames(function.__code__)
            if name not in but:
                function._torchdynamo_disable = True  # type: ignore[attr-defined]
                function._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
                    f"{cls.__name__}.{name} moves tensors in and out of memory"
                )


def _skip_frames(code: CodeType) -> None:
    before_2_7 = getattr(eval_frame, "skip_code", None)
    if before_2_7 is not None:
        before_2_7(code)
        return
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, skip))


# ---------------------------------------------------------------------- what is kept


def read_traced(self: OffloadCache, key: Any) -> torch.Tensor | None:
    """Read an entry in code that dynamo compiles.

    The reference in ``traced`` keeps the memory: whoever would take it counts uses. It is
    there for as long as the cache, and never missing for a moment as a published one is,
    so no guard fails without a reason.
    """
    from torch._dynamo.comptime import comptime  # loaded already where this is traced

    comptime(_keep_while_tracing)
    return self.traced[key]


def update_traced(self: OffloadCache, key: Any, data: torch.Tensor) -> None:
    """Give an entry a new value in code that dynamo compiles: an edit like any other."""
    tensor = read_traced(self, key)
    if tensor is None:
        raise KeyError(key)
    with torch.no_grad():
        tensor.copy_(data)


def unless_exporting(offloaded: torch.Tensor) -> torch.Tensor:
    """Give what stands for an entry on disk, but to ``torch.export``.

    Raises:
        UnsupportedError: a program is being exported, and would lack the tensor's value.
    """
    # torch before 2.7 has the wider question only.
    is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    if offloaded.is_meta and is_exporting():
        raise UnsupportedError(
            "torch.export inside disable_onloading would give a program without its tensors: "
            "export the module as it is outside of it (what is mapped costs no memory), or, "
            "for the graph alone, a plain model made under torch.device('meta')"
        )
    return offloaded


def _keep_while_tracing(context: Any) -> None:
    tracker = context.get_local("self")._i_will_not_complain_if_bc_breaks_VariableTracker()
    keep(getattr(tracker, "realize", lambda: tracker)().value)


def keep(cache: OffloadCache) -> None:
    """Bring all entries of a cache into memory, and keep them there for compiled code.

    Raises:
        StorageError: one cannot be read; those before it are kept.
    """
    residency = cache.residency
    with residency.lock:
        if _is_kept(cache):
            return
        make = _make_of(cache)
        alike = [
            other
            for other in caches_shown
            if other is not cache
            and other.residency is residency
            and _make_of(other) == make
            and not _is_kept(other)
        ]
        _let_writes_end([cache, *alike])
        _keep_one(cache)
        _warn_if_over_budget(residency)
        room_bytes = residency.budget_bytes() - residency.loaded_bytes
        for other in alike:
            need_bytes = sum(_bytes_to_load(other))
            if not need_bytes or need_bytes <= room_bytes:
                room_bytes -= need_bytes
                with suppress(OffloadError):  # whoever reads it gets to know
                    _keep_one(other)


def replace(cache: OffloadCache, key: Any, held: Held | None) -> None:
    """Have compiled code find another entry from now on, if it reads the one it replaces."""
    with cache.residency.lock:
        if key in cache.traced:
            cache.traced[key] = _in_memory(cache, held)


def release_traced(module: torch.nn.Module) -> None:
    """Give back the memory of what compiled code reads of a module and its submodules.

    Their compiled code stays usable: its next call loads the tensors, and compiles anew.
    Not to be called while it runs.
    """
    for part in module.modules():
        for mapping in (part._parameters, part._buffers):
            cache: Any = mapping
            if getattr(cache, "traced", None):
                with cache.residency.lock:
                    cache.traced.clear()
                    for _, held in _entries(cache):
                        if held is not None:
                            cache.residency.release(held)


def _entries(cache: OffloadCache) -> list[tuple[Any, Held | None]]:
    return list(cache.held_items())  # at once: other threads may add some


def _is_kept(cache: OffloadCache) -> bool:
    return all(_is_entry_kept(cache, key) for key, _ in _entries(cache))


def _is_entry_kept(cache: OffloadCache, key: Any) -> bool:
    """Whether an entry is kept on the device it onloads to, which may be set at any time."""
    tensor = cache.traced.get(key)
    if tensor is None:
        return key in cache.traced
    device = cache.onload_device
    return tensor.device.type == device.type and (
        device.type == "cpu" or device.index in (None, tensor.device.index)
    )


def _make_of(cache: OffloadCache) -> tuple[Any, ...]:
    """Tell what the guards of compiled code see of a cache."""
    layouts = [(key, None if held is None else _layout(held)) for key, held in _entries(cache)]
    return type(cache), cache.onload_device, layouts


def _layout(held: Held) -> tuple[torch.dtype, tuple[int, ...]]:
    if held.tensor is None or held.state is State.VACANT:
        assert held.backing is not None  # or the value would be nowhere
        return held.backing.layout
    return held.tensor.dtype, tuple(held.tensor.shape)


def _let_writes_end(caches: list[OffloadCache]) -> None:
    """Have what is being written leave for the file that it can be mapped from.

    Afterwards it could not: memory in use stays what it is.
    """
    waiting = {
        held
        for cache in caches
        for _, held in _entries(cache)
        if held is not None and held.state is State.FRESH and held.ticket is not None
    }
    if waiting:
        with suppress(OffloadError):  # the values are in memory, and sync will tell
            caches[0].residency.sync(waiting.__contains__)


def _bytes_to_load(cache: OffloadCache) -> Iterator[int]:
    for _, held in _entries(cache):
        if held is not None and held.state is State.VACANT:
            backing = held.root.backing
            assert backing is not None  # or the value would be nowhere
            if backing.beneath(cache.onload_device) is None:
                yield held.nbytes


def _keep_one(cache: OffloadCache) -> None:
    for key, held in _entries(cache):
        if not _is_entry_kept(cache, key):
            cache.traced[key] = _in_memory(cache, held)


def _in_memory(cache: OffloadCache, held: Held | None) -> torch.Tensor | None:
    return None if held is None else cache.residency.onload(held, cache.onload_device)


def _warn_if_over_budget(residency: Residency) -> None:
    kept_bytes, budget_bytes = residency.loaded_bytes, residency.budget_bytes()
    if kept_bytes > budget_bytes and residency not in _warned:
        _warned.add(residency)
        _log.warning(
            "compiled code keeps all that it reads in memory: %d MB are loaded, the budget is "
            "%d MB; what is offloaded uncompressed, in the model's dtype and onloaded to the CPU "
            "is mapped and costs none, or compile fewer modules",
            kept_bytes >> 20,
            budget_bytes >> 20,
        )


caches_shown: WeakList[OffloadCache] = WeakList()
"""Those that have entries, or had: so that a cache finds those alike."""

_warned: weakref.WeakSet[Residency] = weakref.WeakSet()

for _cls in (Held, Residency):
    keep_dynamo_out(_cls)
_skip_frames(uses_of.__code__)
