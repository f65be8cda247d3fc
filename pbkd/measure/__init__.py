"""What a network is worth: accuracy, fidelity, calibration, cost and latency of any module."""

from pbkd.measure.accuracy import Evaluation, evaluate
from pbkd.measure.cost import Cost, count, nonzero_macs, nonzero_params
from pbkd.measure.latency import Latency, measure_latency
from pbkd.measure.shock import FeatureDrift, linear_cka

__all__ = [
    "Cost",
    "Evaluation",
    "FeatureDrift",
    "Latency",
    "count",
    "evaluate",
    "linear_cka",
    "measure_latency",
    "nonzero_macs",
    "nonzero_params",
]
