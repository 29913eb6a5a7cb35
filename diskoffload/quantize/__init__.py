"""Quantization of a checkpoint, tensor by tensor, from file to file."""

from diskoffload.quantize.plan import QuantizePlan, plan_quantization
from diskoffload.quantize.run import QuantizeResult, quantize_checkpoint
from diskoffload.resumable.interrupted import Interrupted

__all__ = [
    "Interrupted",
    "QuantizePlan",
    "QuantizeResult",
    "plan_quantization",
    "quantize_checkpoint",
]
