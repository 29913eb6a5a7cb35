"""Data-free weight quantization: the arithmetic and file format of compressed-tensors.

Round to nearest, with scales from each group's largest magnitude, as llm-compressor's
``QuantizationModifier`` does it where a scheme needs no data. Weights are handled one at a
time, by name, so that a checkpoint can be streamed: :meth:`Scheme.obstacle` says why one
cannot be quantized, :meth:`Scheme.outputs` what will be stored in its place before any data
is read, :meth:`Scheme.quantize` computes that in a working memory which does not grow with
the weight, or :meth:`Scheme.begin` does as its rows come, and
:meth:`Scheme.quantization_config` tells transformers and vLLM about it.

``begin``, ``quantize`` and ``quantization_config`` need the extra ``quantize``, the rest torch
alone. Nothing here keeps state: all of it may run in several threads at once.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diskoffload.errors import InvalidInputError, MissingExtraError
from diskoffload.integrations.quantization_arithmetic import WeightQuantizer

logger = logging.getLogger(__name__)

# The dtypes in which compressed-tensors keeps a scale in its weight's own dtype.
_SOURCE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

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
        weight = weight.detach()
        one = self.begin(name, weight.shape, weight.dtype, weight.device)
        (main, (dtype, shape)), *_ = self.outputs(name, weight.shape, weight.dtype).items()
        rows = torch.empty(shape, dtype=dtype, device=weight.device)
        for top in range(0, len(weight), one.rows_together):
            band = slice(top, top + one.rows_together)
            one.add(weight[band], rows[band])
        return {main: rows, **self.end(name, weight.shape, one)}

    def begin(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, device: Any = "cpu"
    ) -> WeightQuantizer:
        """Begin to quantize a weight whose rows come band by band, all of them in their order.

        What :meth:`WeightQuantizer.add` gives of each band makes up the first of the
        :meth:`outputs`, and :meth:`end` gives the others; the bits are those of :meth:`quantize`.
        Raises as that does.
        """
        self.outputs(name, shape, dtype)  # refuses what cannot be
        return WeightQuantizer(
            shape,
            dtype,
            device,
            bits=self.bits if self.number_type == "int" else 0,
            group_size=self.group_size,
            calculate=_compressed_tensors("quantization.utils").calculate_qparams,
            arguments=self._weight_arguments(),
        )

    def end(self, name: str, shape: Sequence[int], one: WeightQuantizer) -> dict[str, torch.Tensor]:
        """Give all :meth:`outputs` but the first, once every band was added; warn as needed."""
        if one.spoiled_count:
            message = (
                "%s holds NaN or infinity: %d of %d scales are not finite and the weights "
                "under them are lost; check the source checkpoint"
            )
            logger.warning(message, name, one.spoiled_count, one.scales.numel())
        stored = {f"{name}_scale": one.scales}
        if self.number_type == "int":
            stored[f"{name}_shape"] = torch.tensor(tuple(shape), device=one.scales.device)
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
