"""Run and quantize PyTorch models that do not fit in memory, straight from their files."""
