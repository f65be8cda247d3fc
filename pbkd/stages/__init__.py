"""The kinds of stage, each in a file of its own, and how one is run."""

from typing import Annotated

from pydantic import Field

from pbkd.stages.assemble import Assemble
from pbkd.stages.base import Context, Stage, Unplanned
from pbkd.stages.block import Block, Member, Progressive
from pbkd.stages.distill import Distill
from pbkd.stages.load import Load
from pbkd.stages.prune import Prune
from pbkd.stages.run import StageResult, run_stage
from pbkd.stages.stabilize import Stabilize
from pbkd.stages.train import Train

RunnableStage = Annotated[
    Load | Train | Block | Assemble | Stabilize | Distill | Prune, Field(discriminator="kind")
]
AnyStage = Annotated[
    Load | Train | Block | Progressive | Stabilize | Distill | Prune, Field(discriminator="kind")
]
KINDS = ("load", "train", "block", "progressive", "stabilize", "distill", "prune")

__all__ = [
    "KINDS",
    "AnyStage",
    "Assemble",
    "Block",
    "Context",
    "Distill",
    "Load",
    "Member",
    "Progressive",
    "Prune",
    "RunnableStage",
    "Stabilize",
    "Stage",
    "StageResult",
    "Train",
    "Unplanned",
    "run_stage",
]
