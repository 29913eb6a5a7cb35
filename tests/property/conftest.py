"""What every property test must leave behind: nothing."""

from garbage import no_garbage

__all__ = ["no_garbage"]
