"""What a network is worth: accuracy, fidelity, calibration, cost, latency and memory of any module."""

from pbkd.measure.accuracy import Evaluation, evaluate
from pbkd.measure.cost import Cost, count, nonzero_macs, nonzero_params
from pbkd.measure.latency import Latency, compiled, measure_latency
from pbkd.measure.memory import peak_memory_mb, reset_peak_memory
from pbkd.measure.shock import FeatureDrift, linear_cka

__all__ = [
    "Cost",
    "Evaluation",
    "FeatureDrift",
    "Latency",
    "compiled",
    "count",
    "evaluate",
    "linear_cka",
    "measure_latency",
    "nonzero_macs",
    "nonzero_params",
    "peak_memory_mb",
    "reset_peak_memory",
]
