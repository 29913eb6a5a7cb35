"""Bytes on disk: names, dtypes and shapes, nothing of modules."""
