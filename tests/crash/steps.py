"""What users do to a model, drawn at random and done to the offloaded and the plain one alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from nets import PARTS, value_of

import diskoffload

Act = Callable[[torch.nn.Module], None]
_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
_BUFFER_DTYPES = (*_DTYPES, torch.int64, torch.uint8, torch.bool, torch.complex64)
_SHAPES = ((40, 40), (6, 4), (7,), (), (0, 3), (30, 70), (1, 1))


def _named(root: torch.nn.Module) -> list[tuple[str, str, bool]]:
    """List part, key and whether it is a parameter, of what is not ``None``."""
    found = []
    for part in PARTS:
        module = root.get_submodule(part)
        for mapping in (module._parameters, module._buffers):
            found += [
                (part, key, mapping is module._parameters)
                for key in mapping
                if mapping[key] is not None
            ]
    return found


class Steps:
    """Draws steps that the plain model allows; each gives the same to whatever it is done to.

    A step that fails because of a file has done nothing yet, or can be done once more.
    """

    def __init__(
        self,
        seed: int,
        plain: torch.nn.Module,
        parts: tuple[str, ...] = PARTS,
        lasting: tuple[str, ...] = (),
    ) -> None:
        """Draw for a model.

        Args:
            seed: of what is drawn.
            plain: the plain model.
            parts: where entries may come, go and be tied; values change everywhere.
            lasting: keys that are never deleted.
        """
        self._rng = random.Random(seed)
        self._plain = plain
        self._parts = parts
        self._lasting = lasting
        self._numbers = 0

    def draw(self) -> tuple[str, Act]:
        """Draw a step; give its name and what does it."""
        kinds = [
            *(self._edit,) * 5,
            *(self._update,) * 3,
            *(self._assign,) * 4,
            self._reshape,
            self._none,
            self._delete,
            self._add,
            self._tie,
            self._view,
            self._freeze,
        ]
        while True:
            kind = self._rng.choice(kinds)
            act = kind()
            if act is not None:
                return kind.__name__.strip("_"), act

    def _pick(
        self, wanted: Callable[[torch.Tensor, bool], bool], *, anywhere: bool = False
    ) -> tuple[str, str, bool] | None:
        found = [
            (part, key, is_parameter)
            for part, key, is_parameter in _named(self._plain)
            if (anywhere or part in self._parts)
            and wanted(_at(self._plain, part, key), is_parameter)
        ]
        return self._rng.choice(found) if found else None

    def _seed(self) -> int:
        self._numbers += 1
        return self._rng.randrange(1 << 20)

    def _edit(self) -> Act | None:
        picked = self._pick(
            lambda tensor, _: tensor.numel() > 0 and tensor.dtype != torch.bool, anywhere=True
        )
        if picked is None:
            return None
        part, key, _ = picked
        how, seed = self._rng.choice(("add", "fill", "first", "data", "numpy", "nan")), self._seed()

        def act(root: torch.nn.Module) -> None:
            tensor = _at(root, part, key)
            with torch.no_grad():
                if how == "add":
                    tensor.add_(1)
                elif how == "first":
                    tensor[(0,) * tensor.dim()] = seed % 50
                elif how == "data":
                    tensor.data.copy_(value_of(tuple(tensor.shape), tensor.dtype, seed))
                elif how == "numpy" and tensor.dtype != torch.bfloat16:
                    tensor.detach().numpy()[...] = seed % 60
                elif how == "nan" and tensor.dtype.is_floating_point:
                    tensor.fill_(float("nan"))
                else:
                    tensor.fill_(seed % 70)

        return act

    def _update(self) -> Act | None:
        picked = self._pick(lambda tensor, _: True, anywhere=True)
        if picked is None:
            return None
        part, key, _ = picked
        seed = self._seed()

        def act(root: torch.nn.Module) -> None:
            tensor = _at(self._plain, part, key)
            value = value_of(tuple(tensor.shape), tensor.dtype, seed)
            diskoffload.update_offload_parameter(root.get_submodule(part), key, value)

        return act

    def _assign(self, *, other: bool = False) -> Act | None:
        picked = self._pick(lambda tensor, _: True, anywhere=not other)
        if picked is None:
            return None
        part, key, is_parameter = picked
        tensor, seed = _at(self._plain, part, key), self._seed()
        shape, dtype = tuple(tensor.shape), tensor.dtype
        if other:
            shape = self._rng.choice(_SHAPES)
            dtype = self._rng.choice(_DTYPES if is_parameter else _BUFFER_DTYPES)
        transposed = len(shape) == 2 and self._rng.random() < 0.3

        def act(root: torch.nn.Module) -> None:
            value = (
                value_of(shape[::-1], dtype, seed).T if transposed else value_of(shape, dtype, seed)
            )
            setattr(root.get_submodule(part), key, _entry(value, is_parameter))

        return act

    def _reshape(self) -> Act | None:
        return self._assign(other=True)

    def _none(self) -> Act | None:
        picked = self._pick(lambda tensor, _: True)
        if picked is None or self._rng.random() < 0.5:
            return None
        part, key, _ = picked
        return lambda root: setattr(root.get_submodule(part), key, None)

    def _delete(self) -> Act | None:
        picked = self._pick(lambda tensor, _: True)
        if picked is None or self._rng.random() < 0.5:
            return None
        part, key, _ = picked
        if key in self._lasting:
            return None

        def act(root: torch.nn.Module) -> None:
            module = root.get_submodule(part)
            if key in module._parameters or key in module._buffers:
                delattr(module, key)

        return act

    def _add(self) -> Act:
        part, seed = self._rng.choice(self._parts), self._seed()
        key, shape = f"n{self._numbers}", self._rng.choice(_SHAPES)
        kind, dtype = self._rng.randrange(3), self._rng.choice(_BUFFER_DTYPES)

        def act(root: torch.nn.Module) -> None:
            module = root.get_submodule(part)
            if kind == 0:
                module.register_parameter(key, _entry(value_of(shape, torch.float32, seed), True))
            elif not hasattr(module, key):
                module.register_buffer(key, value_of(shape, dtype, seed), persistent=kind == 1)

        return act

    def _tie(self) -> Act | None:
        first = self._pick(lambda tensor, _: True)
        if first is None:
            return None
        second = self._pick(lambda _, is_parameter: is_parameter == first[2])
        if second is None or second == first:
            return None
        (part, key, _), (other, other_key, _) = first, second
        return lambda root: setattr(
            root.get_submodule(part), key, getattr(root.get_submodule(other), other_key)
        )

    def _view(self) -> Act | None:
        """Give an entry a new value, and show a part of it as another entry."""
        picked = self._pick(lambda tensor, _: tensor.dim() > 0 and tensor.numel() > 0)
        if picked is None:
            return None
        part, key, is_parameter = picked
        tensor, seed = _at(self._plain, part, key), self._seed()
        shape, dtype = tuple(tensor.shape), tensor.dtype
        home, name = self._rng.choice(self._parts), f"v{self._numbers}"

        def act(root: torch.nn.Module) -> None:
            value = _entry(value_of(shape, dtype, seed), is_parameter)
            setattr(root.get_submodule(part), key, value)
            module = root.get_submodule(home)
            if hasattr(module, name):
                delattr(module, name)  # of a try that failed half-way
            module.register_buffer(name, value.detach()[..., 1:3])

        return act

    def _freeze(self) -> Act | None:
        picked = self._pick(lambda tensor, is_parameter: is_parameter)
        if picked is None:
            return None
        part, key, _ = picked
        wanted = not _at(self._plain, part, key).requires_grad

        def act(root: torch.nn.Module) -> None:
            _at(root, part, key).requires_grad_(wanted)

        return act


def _entry(value: torch.Tensor, is_parameter: bool) -> torch.Tensor:
    return torch.nn.Parameter(value) if is_parameter else value


def _at(root: torch.nn.Module, part: str, key: str) -> Any:
    return getattr(root.get_submodule(part), key)
