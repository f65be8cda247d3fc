"""The training loop, its settings, its resumable state, and the session through which it sees the machine."""

from pbkd.engine.allocator import keep_freed_memory
from pbkd.engine.checkpoints import Checkpoints
from pbkd.engine.loop import fit
from pbkd.engine.mask import Mask
from pbkd.engine.session import LocalSession, Session, Stopped
from pbkd.engine.settings import OptimizerSettings, Precision, TrainingSettings
from pbkd.engine.state import Row, State
from pbkd.engine.task import Task
from pbkd.engine.watch import Watch

ENGINE_VERSION = 1
"""Raised by hand when the same task begins to give other weights; part of every stage key."""

__all__ = [
    "ENGINE_VERSION",
    "Checkpoints",
    "LocalSession",
    "Mask",
    "OptimizerSettings",
    "Precision",
    "Row",
    "Session",
    "State",
    "Stopped",
    "Task",
    "TrainingSettings",
    "Watch",
    "fit",
    "keep_freed_memory",
]
