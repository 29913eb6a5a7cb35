"""Traced tensors against real ones: any order of moves, and every rule transformers has."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_execution import execute
from transformers import conversion_mapping, core_model_loading

from diskoffload.integrations.transformers_conversion import _run
from diskoffload.integrations.transformers_tiles import UntraceableError
from diskoffload.integrations.transformers_tracing import TracedTensor

_COMPUTING = ("Inkling2LoopDequantizeExperts",)
"""Operations that do more than move elements."""

Move = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def _each(move: Callable[[torch.Tensor], torch.Tensor]) -> Move:
    return lambda tensors: [move(tensor) for tensor in tensors]


def _sizes(draw: st.DrawFn, numel: int) -> list[int]:
    """Draw a shape of ``numel`` elements, dimensions of size one among them."""
    sizes = []
    while numel > 1:
        size = draw(st.sampled_from([n for n in range(2, numel + 1) if numel % n == 0]))
        sizes.append(size)
        numel //= size
    for _ in range(draw(st.integers(0, 2))):
        sizes.insert(draw(st.integers(0, len(sizes))), 1)
    return sizes


def _draw_move(draw: st.DrawFn, shape: torch.Size) -> Move:
    """Draw something that can be done to tensors of ``shape``."""
    ndim = len(shape)
    everywhere = draw(st.integers(-ndim - 1, ndim))
    anywhere: list[Move] = [
        lambda tensors: [torch.stack(tensors, everywhere)],
        _each(lambda t: t.unsqueeze(everywhere)),
        _each(lambda t: t.contiguous()),
        _each(lambda t: t.squeeze()),
    ]
    sizes = _sizes(draw, math.prod(shape))
    anywhere.append(_each(lambda t: t.reshape(sizes)))
    if not ndim:
        return draw(st.sampled_from(anywhere))
    dim, other = draw(st.integers(-ndim, ndim - 1)), draw(st.integers(-ndim, ndim - 1))
    order = draw(st.permutations(range(ndim)))
    start = draw(st.integers(0, shape[dim] - 1))
    length = draw(st.integers(1, shape[dim] - start))
    parts = draw(st.integers(1, 3))
    moves: list[Move] = [
        *anywhere,
        lambda tensors: [torch.cat(tensors, dim)],
        lambda tensors: list(torch.chunk(tensors[0], parts, dim)),
        lambda tensors: list(torch.split(tensors[-1], [start, shape[dim] - start], dim))[1:],
        lambda tensors: list(torch.unbind(tensors[0], dim)),
        _each(lambda t: t.transpose(dim, other)),
        _each(lambda t: t.permute(order)),
        _each(lambda t: t.narrow(dim, start, length)),
        _each(lambda t: t.select(dim, start)),
        _each(lambda t: t.squeeze(dim)),
    ]
    return draw(st.sampled_from(moves))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_moves_end_where_they_do_with_real_tensors(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    count = data.draw(st.integers(1, 3))
    numel = math.prod(shape)
    stored = {str(n): torch.arange(n * numel, (n + 1) * numel).reshape(shape) for n in range(count)}
    real = list(stored.values())
    traced: list[torch.Tensor] = [TracedTensor.stored(name, shape, torch.int64) for name in stored]
    for _ in range(data.draw(st.integers(1, 5))):
        move = _draw_move(data.draw, real[0].shape)
        real, traced = move(real), move(traced)
        # Parts may differ in shape; go on with those that are alike.
        real = [tensor for tensor in real if tensor.shape == real[0].shape]
        traced = [tensor for tensor in traced if tensor.shape == traced[0].shape]
    assert [tensor.shape for tensor in traced] == [tensor.shape for tensor in real]
    for tensor, wanted in zip(traced, real, strict=True):
        assert isinstance(tensor, TracedTensor)
        assert torch.equal(execute(tensor.recipe(), stored, wanted.shape, wanted.dtype), wanted)


class _Model:
    """Stands for a model, where a rule asks for a result's shape or for the configuration."""

    def __init__(self, shape: tuple[int, ...], parts: int) -> None:
        # Equal parts of the first dimension, the others turned round: Split reads the first,
        # a Transpose that looks first sees that it is needed.
        self._result = torch.empty(
            shape[0] // parts, *shape[:0:-1], dtype=torch.int64, device="meta"
        )
        heads = SimpleNamespace(num_attention_heads=2)
        text = SimpleNamespace(vocab_size=shape[0], unpadded_vocab_size=shape[0] - 3)
        self.config = SimpleNamespace(
            num_attention_heads=2, vision_config=heads, get_text_config=lambda: text
        )

    def get_parameter(self, name: str) -> torch.Tensor:
        return self._result


def _run_rule(rule: Any, inputs: dict[str, list[torch.Tensor]], shape: tuple[int, ...]) -> Any:
    tensors = {f"{p}{n}": t for p, ts in inputs.items() for n, t in enumerate(ts)}
    taken = [(f"{p}{n}", p) for p, ts in inputs.items() for n in range(len(ts))]
    model = _Model(shape, len(rule.target_patterns))
    return _run(rule, rule.target_patterns[0], taken, model, tensors.__getitem__)


def _check_rule(rule: Any) -> None:
    """Run one converter on real and on traced tensors of made-up values."""
    rope = any("Rope" in type(operation).__name__ for operation in rule.operations)
    shape = (24, 12) if rope else (24, 12, 6)
    stored: dict[str, torch.Tensor] = {}
    names: dict[str, list[str]] = {}
    for pattern in rule.source_patterns:
        for _ in range(4 if "*" in pattern else 1):
            name = str(len(stored))
            start = len(stored) * math.prod(shape)
            stored[name] = torch.arange(start, start + math.prod(shape)).reshape(shape)
            names.setdefault(pattern, []).append(name)
    traced = _run_rule(
        rule,
        {p: [TracedTensor.stored(n, shape, torch.int64) for n in ns] for p, ns in names.items()},
        shape,
    )
    recipes = {name: one.recipe() for name, one in traced.items()}
    real = _run_rule(rule, {p: [stored[n] for n in ns] for p, ns in names.items()}, shape)
    if recipes.keys() != real.keys():
        raise _WrongRecipeError(f"{sorted(real)} were made, and recipes for {sorted(recipes)}")
    for name, wanted in real.items():
        got = execute(recipes[name], stored, wanted.shape, wanted.dtype)
        if not torch.equal(got, wanted):
            raise _WrongRecipeError(name)


class _WrongRecipeError(Exception):
    """A recipe that gives other values than transformers, which nobody would notice."""


def _check_rules() -> dict[str, Exception | None]:
    """Check every rule that the installed transformers has: by its name, what was wrong."""
    found: dict[str, Exception | None] = {}
    for family, rules in conversion_mapping._build_checkpoint_conversion_mapping().items():
        for rule in rules:
            if isinstance(rule, core_model_loading.WeightConverter):
                moves = " > ".join(type(operation).__name__ for operation in rule.operations)
                name = f"{family}: {moves}"
                try:
                    _check_rule(rule)
                    found.setdefault(name, None)
                except Exception as error:
                    found[name] = error
    return found


def _known_rules() -> list[str]:
    lines = (Path(__file__).parent / "transformers_rules.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_every_known_rule_of_transformers_has_a_recipe() -> None:
    found, known = _check_rules(), _known_rules()
    # What a rule computes is left to transformers; that it is seen is all there is to check.
    computed = {rule for rule in known if any(name in rule for name in _COMPUTING)}
    assert {r: repr(found[r]) for r in known if r not in computed and found.get(r)} == {}
    assert {r for r in computed if r in found and not found[r]} == set()
    assert {r: e for r, e in found.items() if isinstance(e, _WrongRecipeError)} == {}
    assert len(found.keys() & set(known)) > 30


def test_newer_rules_of_transformers_are_listed_where_they_have_none() -> None:
    found, known = _check_rules(), _known_rules()
    without = {rule: repr(e) for rule, e in found.items() if e and rule not in known}
    if without:
        # That is in order: transformers' own code is run for them, at opening.
        pytest.skip(f"transformers {transformers.__version__} has newer rules: {without}")


def test_a_permutation_for_rotary_embeddings_takes_a_strided_piece_for_each_half_head() -> None:
    shape = (16, 3)
    permute = core_model_loading.PermuteForRope()
    rule = core_model_loading.WeightConverter("q", "q", operations=[permute])
    stored = {"q": torch.arange(48).reshape(shape)}
    try:
        wanted = _run_rule(rule, {"q": [stored["q"]]}, shape)["q"]
    except AttributeError as error:
        pytest.skip(f"transformers {transformers.__version__} cannot run it itself: {error}")
    made = _run_rule(rule, {"q": [TracedTensor.stored("q", shape, torch.int64)]}, shape)["q"]
    assert [piece.region for piece in made.recipe().pieces] == [
        (slice(0, 7, 2),),
        (slice(1, 8, 2),),
        (slice(8, 15, 2),),
        (slice(9, 16, 2),),
    ]
    assert torch.equal(execute(made.recipe(), stored, wanted.shape, wanted.dtype), wanted)


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (lambda t: t + 1, "aten.add"),
        (lambda t: t.to(torch.float16), "aten._to_copy"),
        (lambda t: t.expand(2, 4, 6), "aten.expand"),
        (lambda t: t[:, ::2], "step 2"),
        (lambda t: torch.cat([t, t[:, :3]]), "compare the checkpoint"),
        (lambda t: torch.stack([t, t.t()]), "compare the checkpoint"),
    ],
)
def test_what_does_more_than_move_elements_is_refused(
    compute: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    with pytest.raises(UntraceableError, match=said):
        compute(TracedTensor.stored("x", (4, 6), torch.float32))


def test_too_many_strips_and_no_elements_are_refused() -> None:
    convolution = TracedTensor.stored("x", (8192, 8192, 3), torch.float32)
    with pytest.raises(UntraceableError, match="16384"):
        convolution.transpose(0, 1).reshape(-1)
    with pytest.raises(UntraceableError, match="no elements"):
        TracedTensor.stored("x", (4, 0), torch.float32)
    with pytest.raises(UntraceableError, match="left out"):
        TracedTensor((4,), torch.float32, ()).recipe()
