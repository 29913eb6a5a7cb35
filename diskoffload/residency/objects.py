"""Tensor objects as torch and Python see them: one made like another, whose it is, who uses it."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from diskoffload.system.memory import elements_overlap, is_laid_plainly

_AS_IT_IS = nullcontext()


def out_of_inference_mode() -> AbstractContextManager[object]:
    """Have tensors made that are not inference mode's; out of it already this costs nothing."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _AS_IT_IS


def object_like(template: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """Make an object of the template's class and attributes over ``data``'s memory."""
    made: torch.Tensor
    if isinstance(template, torch.nn.Parameter):
        made = torch.nn.Parameter(data.detach(), requires_grad=template.requires_grad)
    else:
        made = data.detach()
        made.requires_grad_(template.requires_grad)
    if type(made) is not type(template):
        made.__class__ = type(template)
    if template.__dict__:
        made.__dict__.update(template.__dict__)
    return made


def is_ours_to_move(value: torch.Tensor) -> bool:
    """Whether a value is a plain tensor whose memory may be moved: no graph, no fake, no proxy."""
    try:
        has_graph = value.grad_fn is not None
    except RuntimeError:  # a view edited while autograd was off: torch will not say
        has_graph = True
    if has_graph or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return False
    if is_laid_plainly(value):
        return not value.is_quantized
    return (
        value.layout == torch.strided
        and value.device.type != "meta"
        and type(value).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and not elements_overlap(value)
        and not value.is_quantized
        and not value.is_conj()
        and not value.is_neg()
    )


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Give the addresses of a tensor's first byte and of the one after its last."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.dtype.itemsize


class HasTensor(Protocol):
    """What has an object."""

    @property
    def tensor(self) -> torch.Tensor | None:
        """The object."""


def uses_of(holder: HasTensor) -> tuple[int, int, int, int]:
    """Count the uses of an object: of itself, its tensor, its storage and the storage's object.

    Python's own differ between versions: compare with a holder whose object nobody else has.
    """
    # The object itself as an argument would count once or twice, by who evaluates the frame.
    tensor = holder.tensor
    assert tensor is not None
    storage = tensor.untyped_storage()
    return (
        sys.getrefcount(tensor),
        tensor._use_count(),  # type: ignore[attr-defined]
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(storage),
    )
