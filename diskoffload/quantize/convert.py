"""Convert a stored tensor to another dtype, a band in memory at a time.

Values that overflow are counted, band by band, and warned of. The store's ``CastTensor`` cannot
tell, and it copies all of a tensor that cannot be mapped.
"""

from __future__ import annotations

import logging

import torch

from diskoffload.store.stored import ShardTensor

_log = logging.getLogger(__name__)


class Conversion:
    """Converts one tensor, a band after the other. Not thread-safe."""

    def __init__(self, tensor: ShardTensor, dtype: torch.dtype) -> None:
        """Begin.

        Args:
            tensor: what is converted.
            dtype: to what; its own leaves every band as it is.
        """
        self._tensor, self._dtype = tensor, dtype
        self._lost = 0

    def convert(self, band: torch.Tensor) -> torch.Tensor:
        """Give a band in the wanted dtype: in memory of its own, or as it is."""
        if self._dtype == self._tensor.dtype:
            return band
        made = band.to(self._dtype)
        self._lost += _count_lost(band, made)
        return made

    def end(self) -> None:
        """Warn if values were too large."""
        if self._lost:
            _log.warning(
                "%s: %d values are too large for %s and became infinite, as they would in "
                "transformers; bfloat16 has room for them",
                self._tensor.spec.name,
                self._lost,
                str(self._dtype).removeprefix("torch."),
            )


def _count_lost(source: torch.Tensor, target: torch.Tensor) -> int:
    """Count the values that were finite and are no more."""
    # Of the three dtypes only this one is so narrow that weights do overflow it.
    if target.dtype != torch.float16 or source.dtype.itemsize == 1 or not target.numel():
        return 0
    if torch.stack(torch.aminmax(target)).isfinite().all():  # twenty times faster than counting
        return 0
    return int(target.isinf().sum()) - int(source.isinf().sum())
