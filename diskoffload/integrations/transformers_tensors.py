"""Which of a transformers model's tensors lie where before any weight is bound.

Parameters and what a checkpoint stores go to the meta device; what no checkpoint stores is
computed by the model's own code. Nothing here imports transformers: the model brings what is
needed. None of it may run in two threads at once, for transformers patches torch meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from diskoffload.errors import InvalidInputError

_log = logging.getLogger(__name__)


def compute_tensors(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Replace the named tensors of a model by CPU tensors that its own code initializes.

    This is what ``from_pretrained`` does for tensors that a checkpoint lacks. Tied names stay
    one tensor; all other tensors keep their values. Call it before the model is offloaded.

    Args:
        model: a transformers model; its tensors may be on the meta device.
        names: full names of parameters or buffers; the new ones have their shape and dtype.

    Raises:
        InvalidInputError: if ``model`` cannot initialize tensors, or has no such one.
    """
    if not callable(initialize := getattr(model, "initialize_weights", None)):
        raise InvalidInputError(
            f"Computing tensors of {type(model).__name__}, no initialize_weights() was found; "
            "give a model of transformers 5 or later."
        )
    held: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    held |= dict(model.named_buffers(remove_duplicate=False))
    names = list(names)
    if unknown := [name for name in names if name not in held]:
        raise InvalidInputError(
            f"Computing tensors of {type(model).__name__}, no tensors of these names were found: "
            f"{', '.join(unknown)}; give names as state_dict() or named_buffers() has them."
        )
    fresh = {id(held[name]): (name, _unwritten_like(held[name])) for name in names}
    for place, key in _slots(model):
        if id(place[key]) in fresh:
            place[key] = fresh[id(place[key])][1]
        else:
            # transformers initializes what does not carry this mark.
            place[key]._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    with torch.device("cpu"):
        initialize()
    for name, tensor in fresh.values():
        _clear_unwritten(name, tensor)


def untie(model: torch.nn.Module, name: str) -> None:
    """Give a tied name a parameter of its own, of the same shape, dtype and device.

    For a checkpoint that stores both of two tied tensors with different values: there
    ``from_pretrained`` does not tie them, whatever the configuration says. The new parameter's
    values are not initialized.

    Raises:
        InvalidInputError: if ``model`` has no such parameter.
    """
    owner_name, _, key = name.rpartition(".")
    try:
        tied = model.get_parameter(name)
    except AttributeError as error:
        raise InvalidInputError(
            f"Untying {name!r}, no such parameter was found in {type(model).__name__}."
        ) from error
    own = torch.nn.Parameter(torch.empty_like(tied), requires_grad=tied.requires_grad)
    model.get_submodule(owner_name).register_parameter(key, own)
    # The model's own tie_weights() and save_pretrained() go by this list.
    getattr(model, "all_tied_weights_keys", {}).pop(name, None)


def move_to_meta(model: torch.nn.Module) -> None:
    """Give back the memory of tensors made by constructors that know no device context.

    ``torch.Tensor(n)`` is one; some models still use it.
    """
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for place, key in _slots(model):
        if not (tensor := place[key]).is_meta:
            empty = tensor.detach().to("meta")
            if isinstance(tensor, torch.nn.Parameter):
                empty = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
            # The old one stays in the dictionary, lest another object gets its id.
            place[key] = moved.setdefault(id(tensor), (tensor, empty))[1]


def non_persistent_buffers(model: torch.nn.Module) -> list[str]:
    """List the buffers that no state dict holds."""
    return [
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules()
        for key in module._non_persistent_buffers_set
        if module._buffers.get(key) is not None
    ]


def _slots(model: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Give each place of a tensor, tied ones included, as a dictionary and its key."""
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for place in places:
            for key in [key for key, tensor in place.items() if tensor is not None]:
                yield place, key


def _unwritten_like(tensor: torch.Tensor) -> torch.Tensor:
    """Make a CPU tensor whose every element shows that nothing was written to it."""
    made = torch.empty_like(tensor, device="cpu", requires_grad=False)
    made.fill_(_unwritten_value(made.dtype))
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


def _unwritten_value(dtype: torch.dtype) -> float:
    if dtype == torch.bool:
        return False
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return torch.iinfo(dtype).max


@torch.no_grad()
def _clear_unwritten(name: str, tensor: torch.Tensor) -> None:
    """Put zeros where the model's code left a tensor as it was, and say so."""
    mark = _unwritten_value(tensor.dtype)
    unwritten = tensor != tensor if mark != mark else tensor == mark
    if tensor.dtype != torch.bool and bool(unwritten.any()):
        tensor.masked_fill_(unwritten, 0)
        _log.warning(
            "The model's code computes no value for %s, which no checkpoint holds; it is zero",
            name,
        )
