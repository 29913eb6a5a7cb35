"""The places of a model that a checkpoint's tensors go to, found by one walk over it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_Module = torch.nn.Module
_PLAIN_WAYS = ("state_dict", "_save_to_state_dict", "get_extra_state")


class Slots:
    """A model's modules and tensors, as they are now.

    Attributes:
        modules: every module once, by the first of its names.
        tensors: what ``model.state_dict(keep_vars=True)`` gives, which takes three times as long.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.modules: list[tuple[str, torch.nn.Module]] = []
        self.tensors: dict[str, torch.Tensor] = {}
        is_plain = True  # its names are those of the modules, with that of the tensor behind
        plain_classes: set[type] = set()
        seen: set[int] = set()
        for prefix, module in model.named_modules(remove_duplicate=False):
            if id(module) not in seen:
                seen.add(id(module))
                self.modules.append((prefix, module))
            is_plain = is_plain and _saves_plainly(module, plain_classes)
            if is_plain:
                self._add(f"{prefix}." if prefix else "", module)
        if not is_plain:
            self.tensors = model.state_dict(keep_vars=True)

    def _add(self, prefix: str, module: torch.nn.Module) -> None:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                self.tensors[prefix + key] = parameter
        if module._buffers:
            for key, buffer in module._buffers.items():
                if buffer is not None and key not in module._non_persistent_buffers_set:
                    self.tensors[prefix + key] = buffer

    def unsaved_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Give the buffers that the state dict lacks."""
        for prefix, module in self.modules:
            for key, buffer in module._buffers.items() if module._buffers else ():
                name = f"{prefix}.{key}" if prefix else key
                if buffer is not None and name not in self.tensors:
                    yield name, buffer


def _saves_plainly(module: torch.nn.Module, plain_classes: set[type]) -> bool:
    """Whether a module has no say of its own in what its state dict is."""
    kind = type(module)
    if kind not in plain_classes:
        if any(getattr(kind, way) is not getattr(_Module, way) for way in _PLAIN_WAYS):
            return False
        plain_classes.add(kind)
    has_hooks = module._state_dict_hooks or module._state_dict_pre_hooks
    return not has_hooks and module.__dict__.keys().isdisjoint(_PLAIN_WAYS)
