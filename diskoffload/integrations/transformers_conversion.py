"""Say which stored tensors fill each tensor of a transformers model.

On loading, transformers renames tensors, stacks a layer's experts, cuts fused projections and
transposes. Here its own rules run on tensors without data, and what they do is written down as
recipes. Nothing is read but names, shapes and dtypes. A rule that computes has no recipe; it
is kept as a :class:`Conversion`, to be run on the real tensors.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch

from diskoffload.errors import UnsupportedTensorError, listed
from diskoffload.integrations.transformers import require_pretrained, require_transformers
from diskoffload.integrations.transformers_tracing import TracedTensor
from diskoffload.store.recipe import Piece, Recipe

_Read = Callable[[str], torch.Tensor]


class StoredSpec(Protocol):
    """What a checkpoint's header says of one tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored elements."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension."""


@dataclass(frozen=True)
class ShapeMismatch:
    """A model's tensor and the other shape that the checkpoint would give it."""

    name: str
    model_shape: tuple[int, ...]
    stored_shape: tuple[int, ...]


@dataclass(frozen=True)
class Conversion:
    """Stored tensors that transformers' own code turns into tensors of the model.

    Attributes:
        sources: names of the stored tensors it takes.
        targets: names of the model's tensors it makes.
        reason: why it has no recipe: what was done to the tensors, and why that is no moving.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    reason: str
    _rule: Any = field(repr=False)
    _taken: tuple[tuple[str, str], ...] = field(repr=False)

    def run(self, model: torch.nn.Module, read: _Read) -> dict[str, torch.Tensor]:
        """Make the model's tensors out of real ones.

        Args:
            model: the model; its configuration decides how some are converted.
            read: gives the stored tensor of a name, in the dtype that the model is to have:
                transformers, too, converts dtypes first.

        Returns:
            By a name in :attr:`targets`, the tensor; it may alias what was read.

        Raises:
            UnsupportedTensorError: transformers' code fails on them as well.
        """
        try:
            return _run(self._rule, self.targets[0], self._taken, model, read)
        except Exception as error:  # Whatever foreign code raises.
            raise UnsupportedTensorError(
                f"{len(self.sources)} stored tensors such as {self.sources[0]!r} cannot be made "
                f"into {listed(self.targets)}: transformers' own conversion failed with "
                f"{type(error).__name__}: {error} (without data: {self.reason}); compare the "
                "checkpoint with its config.json"
            ) from error


@dataclass
class RecipeSet:
    """How a checkpoint fills a model, and all that does not fit.

    Names are the model's own, except in ``unexpected``. Each tensor of the model's state dict
    stands in exactly one of ``recipes``, ``ties``, ``missing``, ``to_compute``, ``conversions``
    and ``mismatched``; of tied names that nothing fills, only the first is listed.

    Attributes:
        recipes: name -> how stored tensors make it. Dtypes are not part of it: elements are
            to be converted from the stored dtype to that of the model's tensor.
        ties: name -> the tied name, in ``recipes``, that is the same Parameter.
        duplicates: name in ``ties`` -> recipe of the copy that the checkpoint stores as well.
            If its values differ, transformers does not tie it: see ``untie``.
        missing: names that no stored tensor gives.
        to_compute: the same, where the model's class says that this is in order and that its
            code computes the value: see ``compute_tensors``.
        unexpected: names of stored tensors that nothing uses and nobody expects to be there.
        conversions: what transformers' own code must make, because it has no recipe.
        mismatched: tensors that would get another shape.
    """

    recipes: dict[str, Recipe] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    duplicates: dict[str, Recipe] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    to_compute: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    conversions: list[Conversion] = field(default_factory=list)
    mismatched: list[ShapeMismatch] = field(default_factory=list)


@dataclass
class _Plan:
    """Where transformers' rules send each stored tensor.

    Attributes:
        whole: model name -> the stored tensor that is it.
        converted: name of the first model tensor that a converter makes -> the converter, and
            the stored tensors that it takes, each with the pattern it matched.
        lost: stored name -> the names, none of them the model's, that it would get.
    """

    whole: dict[str, str] = field(default_factory=dict)
    converted: dict[str, tuple[Any, list[tuple[str, str]]]] = field(default_factory=dict)
    lost: dict[str, list[str]] = field(default_factory=dict)


def tensor_recipes(model: torch.nn.Module, stored: Mapping[str, StoredSpec]) -> RecipeSet:
    """Find how the stored tensors of a checkpoint make those of a transformers model.

    As ``from_pretrained`` does, it leaves with the model which rules were used, so that its
    ``save_pretrained`` writes the checkpoint's own names and layout again.

    Args:
        model: a transformers model, its parameters on any device; none is read or changed.
        stored: name -> dtype and shape of every tensor of the checkpoint.

    Raises:
        MissingExtraError: if transformers is not installed.
        InvalidInputError: if ``model`` is no transformers model.
    """
    require_pretrained(model)
    tensors: dict[str, torch.Tensor] = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }
    plan = _plan(model, tensors, stored)
    found = RecipeSet()
    busy: set[str] = set()
    for name, source in plan.whole.items():
        if not _add(found, name, tensors[name], Recipe.whole(source), tuple(stored[source].shape)):
            busy.add(source)
    for name in plan.converted:
        busy |= _convert(found, model, tensors, plan, name, stored)
    _sort_ties(found, model, tensors)
    used = inverse_pieces({**found.recipes, **found.duplicates}).keys() | busy
    ignored = _pattern(_unexpected_patterns(model))
    for source in stored:
        names = plan.lost.get(source, [source])
        if source not in used and not all(ignored and ignored.search(name) for name in names):
            found.unexpected.append(source)
    return found


def revert(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turn tensors of a model back into those that a checkpoint stores, by transformers' code.

    Args:
        model: a transformers model that :func:`tensor_recipes` has seen.
        tensors: by name in the model; on the meta device, too, where only names, shapes and
            dtypes are asked for.

    Returns:
        By stored name; a tensor may alias what was given.

    Raises:
        UnsupportedTensorError: transformers has no way back.
    """
    core = require_transformers("core_model_loading")
    try:
        return dict(core.revert_weight_conversion(model, dict(tensors)))
    except Exception as error:  # Whatever foreign code raises.
        raise UnsupportedTensorError(
            f"{listed(list(tensors))} cannot be turned back into what a checkpoint stores: "
            f"{type(error).__name__}: {error}"
        ) from error


def inverse_pieces(recipes: Mapping[str, Recipe]) -> dict[str, list[tuple[str, Piece]]]:
    """Turn recipes around: which tensors of the model fill each stored one, for saving.

    Returns:
        Stored name -> pairs of a model tensor's name and the piece that says which part of it
        (``piece.target``) is which part of the stored tensor (``piece.region``).
    """
    inverse: dict[str, list[tuple[str, Piece]]] = {}
    for name, recipe in recipes.items():
        for piece in recipe.pieces:
            inverse.setdefault(piece.source, []).append((name, piece))
    return inverse


def _plan(
    model: Any, tensors: Mapping[str, torch.Tensor], stored: Mapping[str, StoredSpec]
) -> _Plan:
    """Apply transformers' renamings, and see which converter takes what."""
    core = require_transformers("core_model_loading")
    rules = require_transformers("conversion_mapping").get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, core.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, core.WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix
    plan = _Plan()
    # The order decides which expert comes first; some rules also wait for others' keys.
    for source in sorted(stored, key=core.dot_natural_key):
        name, pattern = core.rename_source_key(source, renamings, converters, prefix, tensors)
        if name not in tensors and source in tensors:
            name, pattern = core.rename_source_key(source, [], [], prefix, tensors)
        rule = None if pattern is None else by_pattern[pattern]
        if name not in tensors:
            plan.lost[source] = _target_names(rule, name) if rule else [name]
        elif rule is not None and name not in plan.whole:
            if name not in plan.converted:
                plan.converted[name] = (rule, [])
            plan.converted[name][1].append((source, pattern))
        elif name not in plan.whole and name not in plan.converted:
            plan.whole[name] = source
    if hasattr(core.WeightTransform, "was_used"):
        rules = [rule for rule in rules if rule.was_used()]
    model._weight_conversions = rules
    return plan


def _target_names(rule: Any, name: str) -> list[str]:
    """Expand the name of a converter's first result to those of all its results."""
    return [name.replace(rule.target_patterns[0], target) for target in rule.target_patterns]


def _convert(
    found: RecipeSet,
    model: Any,
    tensors: Mapping[str, torch.Tensor],
    plan: _Plan,
    name: str,
    stored: Mapping[str, StoredSpec],
) -> set[str]:
    """Run one converter; return the stored tensors that it takes without making a recipe."""
    rule, taken = plan.converted[name]
    sources = tuple(dict.fromkeys(source for source, _ in taken))

    wanted = tensors[name].dtype

    def traced(source: str) -> torch.Tensor:
        dtype = stored[source].dtype
        # transformers converts dtypes first; a rule that does it again finds nothing to do.
        if dtype.is_floating_point and wanted.is_floating_point:
            dtype = wanted
        return TracedTensor.stored(source, stored[source].shape, dtype)

    try:
        made = _run(rule, name, taken, model, traced)
        recipes = {
            target: (cast(TracedTensor, tensor).recipe(), tuple(tensor.shape))
            for target, tensor in made.items()
        }
    except Exception as error:  # Whatever foreign code raises: this conversion has no recipe.
        operations = " > ".join(type(operation).__name__ for operation in rule.operations)
        reason = f"{operations}: {type(error).__name__}: {error}"
        targets = tuple(target for target in _target_names(rule, name) if target in tensors)
        found.conversions.append(Conversion(sources, targets, reason, rule, tuple(taken)))
        return set(sources)
    fitting = [
        _add(found, target, tensors[target], recipe, shape)
        for target, (recipe, shape) in recipes.items()
        if target in tensors
    ]
    return set() if fitting and all(fitting) else set(sources)


def _run(
    rule: Any, name: str, taken: Sequence[tuple[str, str]], model: Any, read: _Read
) -> dict[str, torch.Tensor]:
    """Run a copy of a converter, which keeps what it was given."""
    own = copy.deepcopy(rule)
    for source, pattern in taken:
        own.add_tensor(name, source, pattern, read(source))
    made = own.convert(name, model=model, config=model.config)
    # Early releases of transformers 5 return their errors beside it.
    results = (made[0] if isinstance(made, tuple) else made).items()
    return {target: value[0] if isinstance(value, list) else value for target, value in results}


def _add(
    found: RecipeSet, name: str, tensor: torch.Tensor, recipe: Recipe, shape: tuple[int, ...]
) -> bool:
    """File a recipe, or that its shape does not fit; say whether it fits."""
    if shape == tuple(tensor.shape):
        found.recipes[name] = recipe
        return True
    found.mismatched.append(ShapeMismatch(name, tuple(tensor.shape), shape))
    return False


def _sort_ties(found: RecipeSet, model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Let one name stand for each tied tensor, and find what nothing fills."""
    optional = _pattern(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    faulty = {mismatch.name for mismatch in found.mismatched}
    faulty |= {target for conversion in found.conversions for target in conversion.targets}
    tied: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        tied.setdefault(id(tensor), []).append(name)
    for names in tied.values():
        bound = next((name for name in names if name in found.recipes), None)
        if bound is not None:
            for name in names:
                if name != bound:
                    found.ties[name] = bound
                    if name in found.recipes:
                        found.duplicates[name] = found.recipes.pop(name)
        elif faulty.isdisjoint(names):
            expected = optional is None or not any(map(optional.search, names))
            (found.missing if expected else found.to_compute).append(names[0])


def _unexpected_patterns(model: Any) -> list[str]:
    """List what a checkpoint may hold too much, by the model's class and by old habit."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    # Both were stored once, and are computed now.
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return patterns


def _pattern(patterns: Any) -> re.Pattern[str] | None:
    """Join regular expressions into one, or ``None`` if there are none."""
    joined = "|".join(f"({pattern})" for pattern in patterns)
    return re.compile(joined) if joined else None
