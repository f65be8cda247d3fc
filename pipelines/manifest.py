"""The manifest: what is written down of a finished stage."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from pbkd.preprocessing import Preprocessing
from pipelines.lease import hex_name

Hex = Annotated[str, AfterValidator(hex_name)]
"""A stage key or digest: as the name of a file it stays in its folder."""

Number = float | int | None


class Interface(BaseModel):
    """What somebody must know to use a network: how it sees an image, and what its logits stand for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preprocessing: Preprocessing
    classes: tuple[str, ...]


class Input(BaseModel):
    """A stage that this one starts from (`from`), learns from (`teacher`) or joins (`block`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    key: Hex


class Manifest(BaseModel):
    """The record of a finished stage: what went in, what came out. Published once, never changed.

    interface: of the network; None in manifests from before it was kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    key: Hex
    kind: str
    settings: dict[str, Any]
    inputs: list[Input]
    data_digest: Hex | None
    seed: int
    compute: dict[str, Any]
    artifact: Hex
    digest: Hex
    metrics: dict[str, Number]
    history: list[dict[str, Number | str]]
    seconds: float
    versions: dict[str, str]
    machine: dict[str, Any]
    git: str | None
    created: float
    interface: Interface | None = None
