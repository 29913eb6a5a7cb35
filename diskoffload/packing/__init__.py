"""Compression of a whole checkpoint, and back, from file to file."""

from diskoffload.packing.pack import PackPlan, PackResult, pack_checkpoint, plan_packing
from diskoffload.packing.unpack import (
    UnpackPlan,
    UnpackResult,
    plan_unpacking,
    unpack_checkpoint,
)

__all__ = [
    "PackPlan",
    "PackResult",
    "UnpackPlan",
    "UnpackResult",
    "pack_checkpoint",
    "plan_packing",
    "plan_unpacking",
    "unpack_checkpoint",
]
