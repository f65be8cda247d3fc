"""What a network is worth: accuracy, fidelity, calibration, cost and latency of any module."""

from pbkd.measure.accuracy import Evaluation, evaluate
from pbkd.measure.cost import Cost, count, nonzero_params
from pbkd.measure.latency import Latency, measure_latency

__all__ = ["Cost", "Evaluation", "Latency", "count", "evaluate", "measure_latency", "nonzero_params"]
