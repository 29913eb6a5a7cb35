"""Quantization of a checkpoint, tensor by tensor, from file to file."""

from diskoffload.quantize.plan import QuantizePlan
from diskoffload.quantize.run import QuantizeResult, plan_quantization, quantize_checkpoint
from diskoffload.resumable.interrupted import Interrupted

__all__ = [
    "Interrupted",
    "QuantizePlan",
    "QuantizeResult",
    "plan_quantization",
    "quantize_checkpoint",
]
