"""Run and quantize PyTorch models that do not fit in memory, straight from their files."""

from diskoffload.alignment import align_module_device, align_modules
from diskoffload.cache.base import OffloadCache
from diskoffload.cache.cpu import CPUCache
from diskoffload.cache.device import DeviceCache
from diskoffload.cache.disk import DiskCache
from diskoffload.cache.modes import disable_offloading, disable_onloading
from diskoffload.cache.tracing import release_traced
from diskoffload.checkpoint.open import open_checkpoint
from diskoffload.checkpoint.save import save_checkpoint
from diskoffload.committing.commit import commit, last_commit
from diskoffload.committing.reopen import reopen
from diskoffload.dispatch import (
    dispatch_model,
    dispatch_with_map,
    get_device_map,
    offload_model,
    remove_dispatch,
    set_onload_device,
)
from diskoffload.errors import (
    AlreadyOffloadedError,
    BudgetError,
    CheckpointError,
    CheckpointMismatchError,
    ClosedError,
    CommitError,
    DamagedFileError,
    FolderInUseError,
    InvalidInputError,
    MissingExtraError,
    NoSpaceError,
    NotOffloadedError,
    OffloadError,
    OutputExistsError,
    StorageError,
    UnsupportedError,
    UnsupportedTensorError,
)
from diskoffload.forward import unwrap_offload_forward
from diskoffload.model_plan import plan_model
from diskoffload.module import (
    get_cache_init_kwargs,
    get_execution_device,
    get_offloaded_device,
    offload_module,
    register_offload_module,
    remove_module_offload,
    update_offload_parameter,
)
from diskoffload.packing import pack_checkpoint, unpack_checkpoint
from diskoffload.plan import Plan
from diskoffload.store.commits import Committed
from diskoffload.store.sweeping import sweep
from diskoffload.verifying import verify

__all__ = [
    "AlreadyOffloadedError",
    "BudgetError",
    "CPUCache",
    "CheckpointError",
    "CheckpointMismatchError",
    "ClosedError",
    "CommitError",
    "Committed",
    "DamagedFileError",
    "DeviceCache",
    "DiskCache",
    "FolderInUseError",
    "InvalidInputError",
    "MissingExtraError",
    "NoSpaceError",
    "NotOffloadedError",
    "OffloadCache",
    "OffloadError",
    "OutputExistsError",
    "Plan",
    "StorageError",
    "UnsupportedError",
    "UnsupportedTensorError",
    "align_module_device",
    "align_modules",
    "commit",
    "disable_offloading",
    "disable_onloading",
    "dispatch_model",
    "dispatch_with_map",
    "get_cache_init_kwargs",
    "get_device_map",
    "get_execution_device",
    "get_offloaded_device",
    "last_commit",
    "offload_model",
    "offload_module",
    "open_checkpoint",
    "pack_checkpoint",
    "plan_model",
    "register_offload_module",
    "release_traced",
    "remove_dispatch",
    "remove_module_offload",
    "reopen",
    "save_checkpoint",
    "set_onload_device",
    "sweep",
    "unpack_checkpoint",
    "unwrap_offload_forward",
    "update_offload_parameter",
    "verify",
]

__version__ = "0.1.0"
