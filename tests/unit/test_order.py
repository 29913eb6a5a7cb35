"""The learned order of reads, held against the best that anybody could have done (Belady)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from diskoffload.residency.order import Order

SIZES = [1, 4, 4, 11]


def sizes_of(trace: Sequence[int]) -> dict[int, int]:
    chosen = random.Random(1)
    return {key: chosen.choice(SIZES) for key in sorted(set(trace))}


def hits(
    trace: Sequence[int],
    room: int,
    next_use: Callable[[int, int], float],
    read: Callable[[int], None],
) -> int:
    """Count the bytes that were there, if who is needed last leaves first."""
    sizes, there, taken, found = sizes_of(trace), set[int](), 0, 0
    for number, key in enumerate(trace):
        read(key)
        if key in there:
            found += sizes[key]
            continue
        there.add(key)
        taken += sizes[key]
        while taken > room:
            victim = max(there, key=lambda one: next_use(one, number))
            there.discard(victim)
            taken -= sizes[victim]
    return found


def ours(trace: Sequence[int], room: int, expected: Sequence[int] = ()) -> int:
    order = Order(expected)
    return hits(trace, room, lambda key, _: order.next_use(key), order.read)


def best(trace: Sequence[int], room: int) -> int:
    places: dict[int, list[int]] = {}
    for number, key in enumerate(trace):
        places.setdefault(key, []).append(number)

    def next_use(key: int, now: int) -> float:
        return next((place for place in places[key] if place > now), float("inf"))

    return hits(trace, room, next_use, lambda key: None)


DENSE = list(range(60))
PIPELINE = [key for layer in range(10) for key in list(range(layer * 6, layer * 6 + 6)) * 2]


def likes(power: int, seed: int) -> list[list[float]]:
    """Say how much each of 8 experts in each of 8 layers is liked; 0 is all alike."""
    chosen = random.Random(seed)
    return [[chosen.random() ** power for _ in range(8)] for _ in range(8)]


def experts(passes: int, power: int = 6, seed: int = 2) -> list[int]:
    """Route over 8 layers of 3 common tensors and 8 experts, some of them liked much more."""
    chosen = random.Random(seed + 100)
    trace: list[int] = []
    for _ in range(passes):
        for layer, weights in enumerate(likes(power, seed)):
            trace += [layer * 11 + number for number in range(3)]
            picked = set(chosen.choices(range(8), weights, k=2))
            trace += [layer * 11 + 3 + one for one in sorted(picked)]
    return trace


def with_likes_known(trace: Sequence[int], room: int, power: int, seed: int) -> int:
    """Decide as well as whoever knows how much each expert is liked, and not what comes."""
    every_pass = {11 * layer + number: 0.0 for layer in range(8) for number in range(11)}
    for layer, weights in enumerate(likes(power, seed)):
        for expert, weight in enumerate(weights):
            share = 1 - (1 - weight / sum(weights)) ** 2
            every_pass[layer * 11 + 3 + expert] = 1 / max(share, 1e-9) - 1

    def next_use(key: int, now: int) -> float:
        turn = (key // 11 - trace[now] // 11) % 8 or 8
        return turn + 8 * every_pass[key]

    return hits(trace, room, next_use, lambda key: None)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    ("trace", "expected", "least"),
    [
        (DENSE * 8, DENSE, 0.95),
        # That every layer is visited twice is to be learned at the first of ten.
        (PIPELINE, DENSE, 0.95),
        (PIPELINE * 6, DENSE, 0.95),
        # Who knows the future knows what a router will pick: nobody else can.
        (experts(30), range(88), 0.95),
    ],
    ids=["dense", "pipeline once", "pipeline", "experts"],
)
def test_hits_are_nearly_the_best(
    trace: list[int], expected: list[int], least: float, share: float
) -> None:
    room = int(sum(sizes_of(trace).values()) * share)
    assert ours(trace, room, expected) >= least * best(trace, room)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("power", [0, 1, 3, 6])
def test_of_a_router_its_likes_are_learned(power: int, share: float) -> None:
    ours_bytes = known_bytes = 0
    for seed in range(2, 6):
        trace = experts(60, power, seed)
        room = int(sum(sizes_of(trace).values()) * share)
        ours_bytes += ours(trace, room, range(88))
        known_bytes += with_likes_known(trace, room, power, seed)
    assert ours_bytes >= 0.95 * known_bytes


def test_likes_that_change_are_learned_anew() -> None:
    trace = experts(200, 3, seed=2) + experts(200, 3, seed=7)
    room = int(sum(sizes_of(trace).values()) * 0.6)
    assert ours(trace, room, range(88)) >= 0.94 * best(trace, room)


def test_the_first_pass_is_expected_in_the_order_of_the_model() -> None:
    order = Order([10, 11, 12, 13])
    order.read(10)
    assert list(order.expected())[:3] == [11, 12, 13]


def test_another_order_is_known_after_one_pass() -> None:
    order = Order(DENSE)
    changed = random.Random(3).sample(DENSE, len(DENSE))
    for key in changed:
        order.read(key)
    order.read(changed[0])
    assert list(order.expected())[: len(changed) - 1] == changed[1:]


def test_two_interleaved_models_are_one_order() -> None:
    order, missed = Order(), 0
    trace = [key for one, two in zip(DENSE, DENSE, strict=True) for key in (one, 100 + two)]
    for number, key in enumerate(trace * 3):
        if number >= len(trace) + 4:
            missed += next(order.expected(), None) != key
        order.read(key)
    assert missed == 0


def test_an_early_exit_costs_one_wrong_guess_a_pass() -> None:
    order, missed = Order(DENSE), 0
    for length in (60, 30, 60, 30, 45, 60):
        for key in DENSE[:length]:
            missed += next(order.expected(), None) != key
            order.read(key)
    assert missed <= 2 * 6


def test_what_is_remembered_is_bounded() -> None:
    order = Order()
    for key in DENSE * 200:
        order.read(key)
    assert len(order._sequence) < 2048
    assert len(order._last_by_context) < 4 * 2048
    assert list(order.expected())[:3] == [0, 1, 2]
