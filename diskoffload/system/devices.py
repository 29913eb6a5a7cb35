"""Which devices this machine really has."""

from __future__ import annotations

import torch

from diskoffload.errors import InvalidInputError

_CPU = torch.device("cpu")


def usable_device(device: torch.device | str | int) -> torch.device:
    """Give a device that tensors can be brought to.

    An accelerator is started up if it has not been yet.

    Raises:
        InvalidInputError: no such device, or not on this machine.
    """
    try:
        found = torch.device(device)
        if found != _CPU:
            torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidInputError(
            f"cannot onload to {device!r}: {reason}; name a device that this machine has, "
            "'cpu' if there is no other"
        ) from error
    return found
