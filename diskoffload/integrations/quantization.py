"""Data-free weight quantization: the arithmetic and file format of compressed-tensors.

Round to nearest, with scales from each group's largest magnitude, as llm-compressor's
``QuantizationModifier`` does it where a scheme needs no data. Weights are handled one at a
time, by name, so that a checkpoint can be streamed: :meth:`Scheme.obstacle` says why one
cannot be quantized, :meth:`Scheme.outputs` what will be stored in its place before any data
is read, :meth:`Scheme.quantize` computes that in a working memory which does not grow with
the weight, :meth:`Scheme.quantization_config` tells transformers and vLLM about it.

Scales are computed by compressed-tensors itself, rounding and packing here, in blocks.
``quantize`` and ``quantization_config`` need the extra ``quantize``, the rest torch alone.
Nothing here keeps state: all of it may run in several threads at once.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diskoffload.errors import InvalidInputError, MissingExtraError

logger = logging.getLogger(__name__)

# The dtypes in which compressed-tensors keeps a scale in its weight's own dtype.
_SOURCE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Integers of the same size.
_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}

# Elements worked on at once. Scratch takes at most 10 bytes for each (a float64 copy and an
# int16): 20 MiB, 4 for bfloat16. Measured: larger blocks are not faster.
_BLOCK_ELEMENTS = 1 << 21

# By dtype: what is added to round to whole numbers, see _Scratch.pack_nibbles, and the sum's bits.
# Even, so that halves go where they should; and 17 * 68 + 4 and 17 * 98 + 6 are 8 * 17 in a byte,
# what the format adds to two numbers.
_TO_WHOLE = {
    torch.bfloat16: (128 + 68, 0x4300 + 68),
    torch.float16: (1024 + 98, 0x6400 + 98),
}

# Scales are computed for so many blocks at once: it is a dozen calls of torch for few numbers. Each
# block is read twice, so the others must not push it out of the page cache, whatever the weight.
_BLOCKS_TOGETHER = 8

# Keys of config.json that only a quantized checkpoint has, and whose they are where they
# name no method ("compression_config" is what compressed-tensors wrote at first).
_QUANTIZED_BY_KEY = {
    "quantization_config": "an unnamed method",
    "compression_config": "compressed-tensors",
    "quantization": "mlx",
}


@dataclass(frozen=True)
class Scheme:
    """One way to quantize a weight matrix. Immutable; found by :func:`scheme_named`.

    Every scheme is symmetric: there are no zero points. ``number_type`` is ``"int"`` or
    ``"float"`` (float8_e4m3fn), ``group_size`` how many neighbouring columns share a scale
    (``None``: a whole row), ``file_format`` compressed-tensors' name for the storage. With
    ``dynamic_activations`` inputs are quantized as the model runs; nothing of it is stored.
    """

    name: str
    bits: int
    number_type: str
    group_size: int | None
    file_format: str
    dynamic_activations: bool

    def obstacle(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> str | None:
        """Say why the stored tensor ``name`` cannot be quantized; ``None`` if it can.

        Only name, shape and dtype are judged. Whether the tensor belongs to a linear layer
        (and not to an embedding, a router or a norm) is the caller's to know.

        Columns that the group size does not divide are refused, never padded, as by
        compressed-tensors, llm-compressor and vLLM.
        """
        if name.rpartition(".")[2] != "weight":
            return "its name does not end in '.weight', the only one the format replaces"
        if len(shape) != 2:
            return f"it has {len(shape)} dimensions and a matrix is needed"
        if dtype not in _SOURCE_DTYPES:
            return f"it is {dtype} and a float of 16, 32 or 64 bits is needed"
        if 0 in shape:
            return f"it is empty, its shape is {tuple(shape)}"
        if self.group_size is not None and shape[1] % self.group_size:
            return f"its {shape[1]} columns do not divide into groups of {self.group_size}"
        return None

    def outputs(
        self, name: str, shape: Sequence[int], dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor that is stored in place of ``name``, by its name.

        Exactly what :meth:`quantize` returns, in the same order. For ``x.weight`` of shape
        (rows, columns), with ``groups`` scales in a row:

        - integers: ``x.weight_packed`` int32 (rows, ceil(columns * bits / 32)),
          ``x.weight_scale`` of the weight's dtype (rows, groups), ``x.weight_shape`` int64 (2,);
        - float8: ``x.weight`` float8_e4m3fn (rows, columns), ``x.weight_scale`` as above.

        Raises :class:`~diskoffload.errors.InvalidInputError` where there is an obstacle.
        """
        reason = self.obstacle(name, shape, dtype)
        if reason is not None:
            found = f"{name!r} cannot be quantized to {self.name}: {reason}"
            raise InvalidInputError(f"{found}; leave it as it is, its layer in the ignored ones")
        rows, columns = shape
        scale = (dtype, (rows, columns // (self.group_size or columns)))
        if self.number_type == "float":
            return {name: (torch.float8_e4m3fn, (rows, columns)), f"{name}_scale": scale}
        words = -(-columns * self.bits // 32)
        return {
            f"{name}_packed": (torch.int32, (rows, words)),
            f"{name}_scale": scale,
            f"{name}_shape": (torch.int64, (2,)),
        }

    @torch.no_grad()
    def quantize(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize one weight; the result is laid out as :meth:`outputs` says.

        The bits are those of compressed-tensors for all finite weights.

        - A scale is the group's largest magnitude divided by half the range of the integers
          (7.5, 127.5) or by 448 (float8), rounded to the weight's dtype.
        - Where that is zero (zeros, or values too small for the dtype) the scale is the
          dtype's machine epsilon, and the group becomes zero.
        - A NaN or an infinity spoils its group and no other: the scale is NaN or infinite and
          the whole group is NaN once dequantized. One warning is logged, with the count.

        Args:
            name: The stored tensor's name, ending in ``.weight``.
            weight: (rows, columns), of any strides; it is only read.

        Returns:
            New contiguous tensors on the weight's device, owned by the caller; beside them at
            most 32 MiB are in use, however large the weight.

        Raises:
            InvalidInputError: :meth:`obstacle` names a reason.
            MissingExtraError: compressed-tensors is not installed.
        """
        layout = self.outputs(name, weight.shape, weight.dtype)
        calculate = _compressed_tensors("quantization.utils").calculate_qparams
        stored = {
            key: torch.empty(shape, dtype=dtype, device=weight.device)
            for key, (dtype, shape) in layout.items()
        }
        if self.number_type == "float":
            target = stored[name]
        else:
            stored[f"{name}_shape"].copy_(torch.tensor(weight.shape))
            # As bytes, lowest first, a row of words is the row of packed integers. What a
            # row's last word has too many is zero in compressed-tensors.
            target = stored[f"{name}_packed"].view(torch.int8)
            target[:, -(-weight.shape[1] * self.bits // 8) :] = 0
        scales = stored[f"{name}_scale"]
        spoiled = self._fill(weight.detach(), calculate, scales, target)
        if spoiled:
            message = (
                "%s holds NaN or infinity: %d of %d scales are not finite and the weights "
                "under them are lost; check the source checkpoint"
            )
            logger.warning(message, name, spoiled, scales.numel())
        return stored

    def quantization_config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config`` of a ``config.json`` whose weights are stored so.

        Plain JSON values in a new dictionary. It targets ``"Linear"``: vLLM looks for that
        very word before it quantizes experts.

        Args:
            ignore: Linear layers stored as they were, each of them: module names of the
                checkpoint (``"lm_head"``, no ``.weight``), or ``"re:"`` and a pattern for the
                name's start. Routers of experts too, which vLLM builds as linear layers.

        Raises:
            MissingExtraError: compressed-tensors is not installed.
        """
        quantization = _compressed_tensors("quantization")
        inputs = self._arguments("token", dynamic=True) if self.dynamic_activations else None
        group = quantization.QuantizationScheme(
            targets=["Linear"],
            weights=self._weight_arguments(),
            input_activations=inputs,
            format=self.file_format,
        )
        config = quantization.QuantizationConfig(
            config_groups={"group_0": group},
            format=self.file_format,
            quantization_status="compressed",
            ignore=list(ignore),
        )
        return {
            "version": _compressed_tensors().__version__,
            "sparsity_config": {},
            "transform_config": {},
            **config.model_dump(mode="json"),
        }

    def _weight_arguments(self) -> Any:
        strategy = "group" if self.group_size else "channel"
        return self._arguments(strategy, group_size=self.group_size)

    def _arguments(self, strategy: str, **others: Any) -> Any:
        return _compressed_tensors("quantization").QuantizationArgs(
            num_bits=self.bits, type=self.number_type, strategy=strategy, symmetric=True, **others
        )

    def _fill(
        self, weight: torch.Tensor, calculate: Any, scales: torch.Tensor, target: torch.Tensor
    ) -> int:
        """Write the scales and the float8 or packed bytes; count the scales not finite."""
        block_rows, block_columns = self._block_shape(weight.shape[1])
        scratch = _Scratch(min(weight.numel(), block_rows * block_columns), weight, self.bits)
        arguments = self._weight_arguments()
        spoiled = 0
        for top in range(0, len(weight), block_rows * _BLOCKS_TOGETHER):
            rows = slice(top, top + block_rows * _BLOCKS_TOGETHER)
            band, largest = weight[rows], torch.zeros_like(scales[rows])
            for at, _, parts, groups in self._blocks(band):
                scratch.enlarge(largest[at, groups], parts)
            found, _ = calculate(-largest, largest, arguments)
            scales[rows] = found
            spoiled += int(found.isfinite().logical_not_().sum())
            for at, left, parts, groups in self._blocks(band):
                ratios = scratch.divide(parts, found[at, groups].unsqueeze(-1))
                if spoiled and self.number_type == "int":
                    ratios.nan_to_num_(0)  # no whole number; times its scale it is NaN again
                self._store(ratios, target[rows][at], left, scratch)
        return spoiled

    def _blocks(self, weight: torch.Tensor) -> Iterator[tuple[slice, int, torch.Tensor, slice]]:
        """Cut a weight: rows, first column, (rows, groups, columns of a group), groups."""
        columns = weight.shape[1]
        group = self.group_size or columns
        block_rows, block_columns = self._block_shape(columns)
        for top in range(0, weight.shape[0], block_rows):
            rows = slice(top, top + block_rows)
            for left in range(0, columns, block_columns):
                part = weight[rows, left : left + block_columns]
                parts = part.reshape(len(part), -1, min(group, part.shape[1]))
                first = left // group
                yield rows, left, parts, slice(first, first + parts.shape[1])

    def _block_shape(self, columns: int) -> tuple[int, int]:
        """Give a block's rows and columns; it cuts no group but a row too long for one block."""
        unit = self.group_size or 1
        block_columns = min(columns, max(unit, _BLOCK_ELEMENTS // unit * unit))
        return max(1, _BLOCK_ELEMENTS // columns), block_columns

    def _store(
        self, ratios: torch.Tensor, target: torch.Tensor, left: int, scratch: _Scratch
    ) -> None:
        """Round ``ratios`` (overwritten) into ``target``, from the weight's column ``left``."""
        ratios = ratios.flatten(1)
        width = ratios.shape[1]
        if self.number_type == "float":
            limit = torch.finfo(torch.float8_e4m3fn).max
            # compressed-tensors adds a zero point of 0, which makes 0.0 of -0.0.
            target[:, left : left + width].copy_(ratios.add_(0.0).clamp_(-limit, limit))
            return
        if self.bits == 4:
            target[:, left // 2 : (left + width) // 2].copy_(scratch.pack_nibbles(ratios))
            return
        # The format adds half the range: the same as flipping the sign bit.
        ratios.clamp_(-128, 127).round_()
        target[:, left : left + width].copy_(ratios).bitwise_xor_(-128)


class _Scratch:
    """Memory that one call of :meth:`Scheme.quantize` uses again for each block."""

    def __init__(self, elements: int, weight: torch.Tensor, bits: int) -> None:
        self._ratios = torch.empty(elements, dtype=weight.dtype, device=weight.device)
        narrowed = elements if bits == 4 and weight.dtype not in _TO_WHOLE else 0
        self._narrowed = torch.empty(narrowed, dtype=torch.int16, device=weight.device)

    def enlarge(self, largest: torch.Tensor, parts: torch.Tensor) -> None:
        """Raise each of ``largest``, none below zero, to the largest magnitude of its part.

        Of floats without their sign bit those are the larger whose bits, as an integer, are; NaN
        is the largest. torch finds the largest of integers ten times as fast (measured).
        """
        bits = _INTEGERS[parts.dtype]
        magnitudes = self._ratios[: parts.numel()].view(parts.shape).view(bits)
        torch.bitwise_and(parts.view(bits), torch.iinfo(bits).max, out=magnitudes)
        seen = largest.view(bits)
        torch.maximum(seen, magnitudes.amax(-1), out=seen)

    def divide(self, part: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """``part / scale``, contiguous, valid until the next call."""
        return torch.div(part, scale, out=self._ratios[: part.numel()].view(part.shape))

    def pack_nibbles(self, values: torch.Tensor) -> torch.Tensor:
        """Round to whole numbers from -8 to 7, and pack those, plus 8, two to a byte.

        The first of two lies lowest: little-endian, as every file that this package maps.

        Args:
            values: (rows, columns), overwritten; those of 16 bits from -60 to 59.

        Returns:
            (rows, columns / 2) int32 whose lowest bytes are what was packed; valid until the
            next call.
        """
        # bfloat16 has the whole numbers from 128 to 255 and none between: a sum rounds as round
        # does, half to even, and its bits count on from those of 128, which are 0x4300. So does
        # float16 from 1024, 0x6400.
        if values.dtype in _TO_WHOLE:
            number, bits = _TO_WHOLE[values.dtype]
            shifted = values.add_(number).view(torch.int16).clamp_(bits - 8, bits + 7)
        else:
            whole = values.clamp_(-8, 7).round_()
            _, bits = _TO_WHOLE[torch.bfloat16]
            shifted = self._narrowed[: whole.numel()].view(whole.shape).copy_(whole).add_(bits)
        # The third byte of a product is the first number's lowest byte, 16 times the second's,
        # and the first's highest four bits: 4, or 6 of a float16.
        return shifted.view(torch.int32).mul_((1 << 16) + (1 << 4)).bitwise_right_shift_(16)


# W4A16 is compressed-tensors' preset of that name. So was W8A16 up to version 0.15; since
# 0.17 the preset has a scale for each 128 columns, which not every layer's width allows.
# FP8 is the preset FP8_DYNAMIC: the one called plain FP8 stores a scale for each layer's
# inputs, which only data can tell.
_BY_NAME = {
    scheme.name: scheme
    for scheme in (
        Scheme("W8A16", 8, "int", 128, "pack-quantized", dynamic_activations=False),
        Scheme("W4A16", 4, "int", 128, "pack-quantized", dynamic_activations=False),
        Scheme("FP8", 8, "float", None, "float-quantized", dynamic_activations=True),
    )
}

#: The names that :func:`scheme_named` knows. ``W8A16`` and ``W4A16``: integers of 8 and 4 bits,
#: a scale for each 128 columns of a row, as compressed-tensors' presets since 0.17. ``FP8``:
#: float8_e4m3fn, a scale for each row, and inputs quantized for each token (``FP8_DYNAMIC``
#: elsewhere).
SCHEMES: tuple[str, ...] = tuple(_BY_NAME)


def scheme_named(name: str) -> Scheme:
    """The scheme of that name, in capitals or not.

    Raises:
        InvalidInputError: There is none; the message lists those there are.
    """
    scheme = _BY_NAME.get(name.upper())
    if scheme is None:
        raise InvalidInputError(f"unknown scheme {name!r}; choose one of {', '.join(SCHEMES)}")
    return scheme


def already_quantized(config: Mapping[str, Any]) -> str | None:
    """Name the method by which a checkpoint is already quantized; ``None`` if it is not.

    ``config`` is its ``config.json``; parts of it (``text_config``, ...) are searched too.
    Returns what it calls the method (``"gptq"``, ``"fp8"``, ``"mxfp4"``, ...), what its other
    keys give away, or ``"an unnamed method"``.
    """
    for key, value in config.items():
        if not isinstance(value, Mapping) or not value:
            continue
        if key in _QUANTIZED_BY_KEY:
            return _method_of(value) or _QUANTIZED_BY_KEY[key]
        nested = already_quantized(value)
        if nested is not None:
            return nested
    return None


def _method_of(settings: Mapping[str, Any]) -> str | None:
    method = settings.get("quant_method") or settings.get("quant_algo")
    if method:
        return str(method)
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    if "config_groups" in settings:
        return "compressed-tensors"
    inner = settings.get("quantization_config")
    return _method_of(inner) if isinstance(inner, Mapping) else None


def _compressed_tensors(module: str = "") -> Any:
    """A module of compressed-tensors: the one place that asks for the extra ``quantize``."""
    try:
        return importlib.import_module(f"compressed_tensors.{module}".removesuffix("."))
    except ImportError as error:
        raise MissingExtraError(
            "quantizing needs compressed-tensors and transformers, and importing them failed "
            f"({error}); run: pip install 'diskoffload[quantize]'"
        ) from error
