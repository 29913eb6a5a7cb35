"""Hugging Face checkpoints: opened where they lie, saved streaming."""
