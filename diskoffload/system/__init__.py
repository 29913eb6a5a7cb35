"""The only rooms that know the operating system."""
