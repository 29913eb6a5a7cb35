"""Quantization of a checkpoint, tensor by tensor, from file to file."""

from diskoffload.quantize.plan import QuantizePlan, plan_quantization
from diskoffload.quantize.run import Interrupted, QuantizeResult, quantize_checkpoint

__all__ = [
    "Interrupted",
    "QuantizePlan",
    "QuantizeResult",
    "plan_quantization",
    "quantize_checkpoint",
]
