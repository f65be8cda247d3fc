"""The training loop, its settings, its resumable state, and the session through which it sees the machine."""

from pbkd.engine.loop import Task, fit
from pbkd.engine.session import LocalSession, Session, Stopped
from pbkd.engine.settings import OptimizerSettings, Precision, TrainingSettings
from pbkd.engine.state import CheckpointFolder, Row, State

__all__ = [
    "CheckpointFolder",
    "LocalSession",
    "OptimizerSettings",
    "Precision",
    "Row",
    "Session",
    "State",
    "Stopped",
    "Task",
    "TrainingSettings",
    "fit",
]
