"""Work that was asked to stop."""


class Interrupted(KeyboardInterrupt):
    """Work was asked to stop and did, between two tensors; its message says how to go on."""
