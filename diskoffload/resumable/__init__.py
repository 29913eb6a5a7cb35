"""A result that grows in ``OUT.partial``: whose it is, how much is done, how it gets its name."""
