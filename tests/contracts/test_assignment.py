"""Whatever is assigned to an entry, an offloaded module takes it as a plain one does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from ways import DISK_WAYS, Net, check_same, left_memory, make_net

import diskoffload

P = torch.nn.Parameter
COMPLEX = torch.complex(torch.arange(16.0), torch.ones(16))

WEIGHTS = {
    "another shape": lambda: torch.ones(3, 5),
    "another dtype": lambda: torch.ones(3, 5, dtype=torch.float64),
    "transposed": lambda: torch.arange(15.0).reshape(3, 5).t(),
    "permuted": lambda: torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "expanded": lambda: torch.ones(1, 5).expand(3, 5),
    "every second": lambda: torch.arange(16.0)[::2],
    "an offset view": lambda: torch.arange(16.0)[3:7],
    "channels last": lambda: (
        torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    ),
    "empty": lambda: torch.ones(0, 5),
    "scalar": lambda: torch.tensor(3.0),
    "conj": lambda: COMPLEX.clone().conj(),
    "neg": lambda: COMPLEX.clone().conj().imag,
    "real part": lambda: COMPLEX.clone().real,
}


@pytest.mark.parametrize("kind", WEIGHTS)
@torch.no_grad()
def test_a_parameter_of_any_layout(net: Net, way: str, kind: str) -> None:
    plain = make_net()
    for one in (net, plain):
        one.up.weight = P(WEIGHTS[kind]())
    check_same(net, plain)
    mine, theirs = net.up.weight, plain.up.weight
    # Torch itself leaves gaps behind when it moves a tensor to another device.
    if not (way.endswith("elsewhere") and kind in ("every second", "real part")):
        assert mine.stride() == theirs.stride()
    assert (mine.is_conj(), mine.is_neg()) == (theirs.is_conj(), theirs.is_neg())
    del mine
    if kind != "expanded":  # plain torch refuses to write there, too
        for one in (net, plain):
            one.up.weight.mul_(2)
        check_same(net, plain)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_any_layout_is_saved(net: Net, kind: str, tmp_path: Path) -> None:
    value = WEIGHTS[kind]()
    net.up.weight = P(value)
    left_memory(net)
    diskoffload.save_checkpoint(net, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")["up.weight"]
    assert saved.dtype == value.dtype
    assert torch.equal(saved, value)


SLOTS = {
    "buffer of another shape": lambda net: setattr(net, "scale", torch.ones(3)),
    "buffer to None": lambda net: setattr(net, "scale", None),
    "buffer to None and back": lambda net: (
        setattr(net, "scale", None),
        setattr(net, "scale", torch.ones(2)),
    ),
    "parameter to None and back": lambda net: (
        setattr(net.up, "bias", None),
        setattr(net.up, "bias", P(torch.ones(64))),
    ),
    "new buffer": lambda net: net.register_buffer("extra", torch.ones(2)),
    "new buffer, not saved": lambda net: net.register_buffer(
        "extra", torch.ones(2), persistent=False
    ),
    "not saved, then saved": lambda net: (
        net.register_buffer("extra", torch.ones(2), persistent=False),
        net.register_buffer("extra", torch.ones(2), persistent=True),
    ),
    "new parameter": lambda net: net.register_parameter("extra", P(torch.ones(2))),
    "a Buffer": lambda net: setattr(net, "extra", torch.nn.Buffer(torch.ones(3))),
    "a Buffer, not saved": lambda net: setattr(
        net, "extra", torch.nn.Buffer(torch.ones(3), persistent=False)
    ),
    "parameter over buffer": lambda net: setattr(net, "scale", P(torch.ones(3))),
    "tensor over parameter": lambda net: setattr(net.up, "weight", torch.ones(3)),
    "register over parameter": lambda net: net.up.register_buffer("weight", torch.ones(3)),
    "delete and register again": lambda net: (
        delattr(net.up, "bias"),
        net.up.register_parameter("bias", P(torch.ones(64))),
    ),
    "delete twice": lambda net: (delattr(net.up, "bias"), delattr(net.up, "bias")),
    "attribute text": lambda net: setattr(net.up, "weight", "text"),
    "buffer text": lambda net: setattr(net, "scale", "text"),
    "with a graph": lambda net: setattr(net, "scale", net.up.weight * 2),
    "parameter with a graph": lambda net: net.register_parameter("bad", net.up.weight * 2),
    "a graph in place": lambda net: net.scale.mul_(net.up.weight[0]),
    "grad on": lambda net: net.scale.requires_grad_(True),
    "an update that broadcasts": lambda net: diskoffload.update_offload_parameter(
        net.up, "weight", torch.arange(16.0)
    ),
    "an update of another dtype": lambda net: diskoffload.update_offload_parameter(
        net.up, "weight", torch.arange(16)
    ),
    "an update that does not fit": lambda net: diskoffload.update_offload_parameter(
        net.up, "weight", torch.ones(5, 5)
    ),
    "an update with itself": lambda net: diskoffload.update_offload_parameter(
        net.up, "weight", net.up.weight
    ),
}


@pytest.mark.parametrize("action", SLOTS)
def test_slots(net: Net, action: str) -> None:
    plain = make_net()
    outcomes = []
    for one in (net, plain):
        try:
            SLOTS[action](one)
            outcomes.append(None)
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]
    check_same(net, plain, in_use=("up.weight",) if "graph" in action else ())
    assert [name for name, _ in net.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [name for name, _ in net.named_buffers()] == [n for n, _ in plain.named_buffers()]
    for (name, mine), theirs in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert mine.requires_grad == theirs.requires_grad, name


ONE_BYTE = ("int8", "uint8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
MORE_BYTES = (
    *("int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16"),
    *("float32", "float64", "complex32", "complex64", "complex128"),
)
RARE = ("float8_e8m0fnu", "float4_e2m1fn_x2")
DTYPES = [name for name in (*ONE_BYTE, *MORE_BYTES, *RARE, "bool") if hasattr(torch, name)]


def bits_of(dtype: torch.dtype) -> torch.Tensor:
    """Give a tensor of a dtype with every byte in it: NaN payloads and negative zeros, too."""
    raw = torch.arange(256, dtype=torch.uint8)
    return raw > 99 if dtype == torch.bool else raw.view(dtype)


def test_every_dtype_bit_for_bit(net: Net) -> None:
    for name in DTYPES:
        net.register_buffer(f"as_{name}", bits_of(getattr(torch, name)).clone())
    net.extra = P(bits_of(torch.bfloat16).clone())
    left_memory(net)
    for name in DTYPES:
        value, wanted = net.get_buffer(f"as_{name}"), bits_of(getattr(torch, name))
        assert value.dtype == wanted.dtype
        assert torch.equal(value.view(torch.uint8), wanted.view(torch.uint8)), name
    del value
    assert torch.equal(
        net.extra.detach().view(torch.uint8), bits_of(torch.bfloat16).view(torch.uint8)
    )


class Marked(torch.Tensor):
    """A subclass that adds nothing but its name."""


class MarkedParameter(torch.nn.Parameter):
    """The same of parameters, as quantizers have them."""


def test_subclasses_and_their_attributes_survive(net: Net) -> None:
    tensor = torch.ones(4, 4).as_subclass(Marked)
    tensor.note = "buffer"
    parameter = MarkedParameter(torch.ones(4, 4), requires_grad=False)
    parameter.note = "parameter"
    net.register_buffer("marked", tensor)
    net.kept = parameter
    del tensor, parameter
    left_memory(net)
    assert type(net.marked) is Marked
    assert net.marked.note == "buffer"
    assert type(net.kept) is MarkedParameter
    assert net.kept.note == "parameter"
    assert net.kept.sum() == 16
    cache = net._parameters
    if isinstance(cache, diskoffload.OffloadCache):
        offloaded = cache.offloaded_values["kept"]
        assert type(offloaded) is MarkedParameter
        assert offloaded.note == "parameter"


class Pair(torch.Tensor):
    """A traceable wrapper of two tensors, as quantization libraries make them."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Pair:
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)
        made.values_, made.scale = values, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values_", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict, _: object, *sizes: object) -> Pair:
        return cls(parts["values_"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values_, args[0].scale)
        raise NotImplementedError(func)


def test_a_wrapper_of_several_tensors_is_refused(net: Net, way: str) -> None:
    if way == "plain":
        pytest.skip("a plain module takes it")
    wrapper = Pair(torch.ones(4, 4, dtype=torch.int8), torch.ones(4))
    plain = make_net()
    for attempt in (
        lambda: setattr(net, "pair", P(wrapper, requires_grad=False)),
        lambda: net.register_buffer("pair", wrapper),
        lambda: setattr(net.up, "weight", P(wrapper, requires_grad=False)),
    ):
        with pytest.raises(diskoffload.UnsupportedTensorError, match="Pair"):
            attempt()
    check_same(net, plain)
    module = torch.nn.Linear(4, 4)
    module.weight = P(wrapper, requires_grad=False)
    bias = module.bias
    with pytest.raises(diskoffload.UnsupportedTensorError, match="Pair"):
        diskoffload.offload_module(module, "cpu", "cpu")
    assert type(module._parameters) is dict
    assert module.bias is bias


@pytest.mark.parametrize("way", DISK_WAYS)
def test_what_is_assigned_and_replaced_leaves_no_file(net: Net, tmp_path: Path) -> None:
    folder = net.up._parameters.offload_dir
    left_memory(net)
    before = sorted(path.name for path in folder.iterdir())
    for value in range(3):
        for key in ("weight", "more"):
            setattr(net.up, key, P(torch.full((64, 16), float(value))))
        net.up.register_buffer("table", torch.ones(7))
        left_memory(net)
    net.up.more = None
    del net.up.more, net.up.table
    net.up.weight = P(torch.zeros(64, 16))
    net.up.weight = None
    left_memory(net)
    # A thread that packed or wrote the last of it may still be letting go of it.
    deadline = time.monotonic() + 5
    while not {path.name for path in folder.iterdir()} <= set(before):
        assert time.monotonic() < deadline, sorted(path.name for path in folder.iterdir())
        time.sleep(0.01)
