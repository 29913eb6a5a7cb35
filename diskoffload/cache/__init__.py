"""The mappings that take the place of a module's ``_parameters`` and ``_buffers``."""
