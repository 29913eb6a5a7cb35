"""The forward of an offloaded module: its inputs move to the onload device."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from types import CodeType
from typing import Any, TypeVar

import torch
from torch.compiler import is_dynamo_compiling

from diskoffload.cache import modes

_T = TypeVar("_T")
# The attribute in which the plain forward waits; compressed-tensors uses the same name.
_PLAIN_FORWARD = "_original_forward_func"
_HAD_OWN_FORWARD = "_offload_had_own_forward"
# pickle asks an object how it is reduced, copy asks its class: so this is pickle's alone.
_REDUCE = "__reduce_ex__"
_OURS_PREFIX = "_offload_"


def wrap_forward(module: torch.nn.Module) -> None:
    """Make a module's ``forward`` move its inputs to the onload device first."""
    own = module.__dict__.get("forward")
    plain: Any = own if own is not None else module.forward
    bound_to_it = getattr(plain, "__self__", None) is module
    function = plain.__func__ if bound_to_it else _Unbound(plain)
    module.__dict__.update(
        {
            _PLAIN_FORWARD: function,
            _HAD_OWN_FORWARD: own is not None,
            "forward": _moving_inputs(function).__get__(module),
            _REDUCE: _reduced_to_plain.__get__(module),
        }
    )


def unwrap_forward(module: torch.nn.Module) -> None:
    """Give a module its plain ``forward`` back, its own or its class's."""
    plain = module.__dict__.pop(_PLAIN_FORWARD)
    had_own = module.__dict__.pop(_HAD_OWN_FORWARD)
    del module.__dict__["forward"], module.__dict__[_REDUCE]
    if had_own or isinstance(plain, _Unbound) or plain is not type(module).forward:
        module.forward = _bound(plain, module)


def _reduced_to_plain(module: torch.nn.Module, protocol: Any) -> Any:
    """Pickle an offloaded module as the plain one that it stands for; caches are dictionaries."""
    reduced = type(module).__reduce_ex__(module, protocol)
    if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
        return reduced  # the class has its own way, and the module's dictionary is not in it
    ours = {"forward", _PLAIN_FORWARD, _REDUCE}
    state = {
        key: value
        for key, value in reduced[2].items()
        if key not in ours and not key.startswith(_OURS_PREFIX)
    }
    if module.__dict__[_HAD_OWN_FORWARD]:
        state["forward"] = _bound(module.__dict__[_PLAIN_FORWARD], module)
    return (*reduced[:2], state, *reduced[3:])


def _bound(plain: Any, module: torch.nn.Module) -> Any:
    return plain.forward if isinstance(plain, _Unbound) else plain.__get__(module)


class _Unbound:
    """A forward that is not a method of its module (a hook's wrapper, a partial)."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        functools.update_wrapper(self, forward)
        parameters = list(inspect.signature(forward).parameters.values())
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        self.__signature__ = inspect.Signature([first, *parameters])

    def __call__(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


def _moving_inputs(plain: Callable[..., Any]) -> Any:
    """Give the forward that moves its inputs first; one for all modules of a class."""
    found = _wrappers.get(id(plain))
    if found is not None and found.__wrapped__ is plain:
        return found

    @functools.wraps(plain)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # No isinstance: asking an abstract class costs as much as the rest of this.
        device = getattr(self._parameters, "onload_device", None)
        if device is not None:
            args = _send_all(args, device)
            if kwargs:
                kwargs = dict(zip(kwargs, _send_all(tuple(kwargs.values()), device), strict=True))
        return self.__dict__[_PLAIN_FORWARD](self, *args, **kwargs)

    # Dynamo keeps what it has compiled, and how often, by code object: one for all modules
    # would soon have been compiled too often.
    wrapper: Any = forward
    own_code = wrapper.__code__.replace()
    plain_code = getattr(plain, "__code__", None)
    wrapper.__code__ = own_code if plain_code is None else _codes.setdefault(plain_code, own_code)
    _wrappers[id(plain)] = wrapper
    return wrapper


# The wrappers in use, each by the identity of the forward that it keeps alive.
_wrappers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
# The wrapper's code for each forward that it wraps.
_codes: weakref.WeakKeyDictionary[CodeType, CodeType] = weakref.WeakKeyDictionary()


def _send_all(values: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    for value in values:
        if not isinstance(value, torch.Tensor) or value.device != device:
            # Compiled code heeds no mode, and would be compiled anew whenever one is entered.
            if not is_dynamo_compiling() and modes.entered and modes.current().onloading_disabled:
                return values
            return tuple([send_tensors(value, device) for value in values])
    return values  # the usual case: all are there already


def send_tensors(value: _T, device: torch.device) -> _T:
    """Move the tensors in a value to a device, through lists, tuples, dicts and dataclasses.

    What is there already, and what is none of these, is given back itself.
    """
    found: Any = value
    if isinstance(value, torch.Tensor):
        there = value.device.type == device.type and (
            device.type == "cpu" or device.index in (None, value.device.index)
        )
        return value if there else value.to(device)  # type: ignore[return-value]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(send_tensors(item, device) for item in value))
    if type(value) in (list, tuple):
        return type(value)(send_tensors(item, device) for item in found)  # type: ignore[call-arg]
    if type(value) is dict:
        return {key: send_tensors(item, device) for key, item in found.items()}  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        moved = {
            f.name: send_tensors(getattr(value, f.name), device) for f in fields(value) if f.init
        }
        if any(item is not getattr(value, name) for name, item in moved.items()):
            return replace(value, **moved)
    return value


@contextmanager
def unwrap_offload_forward(module: torch.nn.Module) -> Iterator[None]:
    """Have the plain ``forward`` on a module inside the context.

    What is assigned to ``module.forward`` meanwhile is the plain forward afterwards,
    wrapped again. A module that is not offloaded is left alone.
    """
    plain = module.__dict__.get(_PLAIN_FORWARD)
    if plain is None:
        yield
        return
    before = _bound(plain, module)
    module.forward = before
    try:
        yield
    finally:
        changed = module.__dict__.get("forward", before) is not before
        if changed or "forward" not in module.__dict__:
            had_own = changed
            wrap_forward(module)
            module.__dict__[_HAD_OWN_FORWARD] = had_own
        else:
            module.forward = _moving_inputs(plain).__get__(module)
