"""The model registry: students and baselines of a recipe, a version an artifact, the best as champion."""

import logging
import math
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pbkd import artifact
from pbkd.errors import UserError
from pipelines.manifest import Manifest
from pipelines.mlflow_model import write_model
from pipelines.quantities import human
from pipelines.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

CHAMPION = "champion"
INPUT = "images"


def register(
    client: "MlflowClient",
    store: Store,
    recipe: str,
    stage: str,
    role: str,
    manifest: Manifest,
    run_id: str,
    model_id: str,
) -> None:
    """Make the artifact a version of the registered model `recipe`, unless it is, and choose the champion.

    The champion is the version with the best validation accuracy among those whose role is `student`; of
    equals, the one with the fewest multiply-accumulates. Baselines are registered, but are no candidates.
    """
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(recipe)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        model = client.create_registered_model(
            recipe,
            description=f"Students that recipe `{recipe}` made, and baselines to compare them with. "
            f"A version is an artifact; `@{CHAMPION}` is the student with the best validation accuracy.",
        )
    versions = {
        version.tags.get("pbkd.artifact", ""): version
        for version in client.search_model_versions(f"name = '{recipe}'", max_results=1000)
    }
    version = versions.get(manifest.artifact)
    if version is None:
        _add_files(client, store, manifest, run_id, model_id)
        version = client.create_model_version(
            recipe,
            source=client.get_logged_model(model_id).artifact_location,
            run_id=run_id,
            tags=_tags(manifest, role),
            await_creation_for=0,
            model_id=model_id,
            description=_description(manifest, stage, role),
        )
    elif role == "student" and version.tags.get("pbkd.role") != role:
        client.set_model_version_tag(recipe, version.version, "pbkd.role", role)
        version = client.get_model_version(recipe, version.version)
    versions[manifest.artifact] = version
    students = [version for version in versions.values() if version.tags.get("pbkd.role") == "student"]
    if students:
        best = max(students, key=_merit)
        if str(model.aliases.get(CHAMPION)) != str(best.version):
            client.set_registered_model_alias(recipe, CHAMPION, best.version)


def _description(manifest: Manifest, stage: str, role: str) -> str:
    """A version in a few lines of Markdown: what it is, how good, how small, where it came from."""
    metrics = manifest.metrics
    accuracy, ratio = metrics.get("test_accuracy"), metrics.get("macs_ratio")
    said = f"The {role} `{stage}` ({manifest.kind})"
    if accuracy is not None:
        said += f": {accuracy:.2f} % on the test set"
    if ratio is not None:
        said += f", {human(metrics.get('macs'))} multiply-accumulates, {ratio:.2f}x fewer than its teacher's"
    return (
        f"{said}.\n\n"
        f"* lineage: `pbkd lineage {manifest.artifact[:12]}`\n"
        f"* weights: `artifacts/{manifest.artifact}` below the store\n"
        f"* data: sha256 `{manifest.data_digest}`"
    )


def _add_files(client: "MlflowClient", store: Store, manifest: Manifest, run_id: str, model_id: str) -> None:
    """Give the logged model what it takes to answer anywhere: a copy of the artifact, and MLflow's files."""
    if manifest.interface is None:
        log.warning(
            "%s cannot be served by its name: it was made before its preprocessing was kept; pbkd export it",
            manifest.artifact[:12],
        )
        return
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder, path = Path(scratch), store.artifact(manifest.artifact)
            outputs = artifact.read(path).spec.num_classes
            shutil.copytree(path, folder / "artifact")
            described = manifest.interface.model_dump(mode="json") | {
                "input": INPUT, "input_type": "float32", "dynamic_batch": True, "outputs": outputs,
            }  # fmt: skip
            write_model(folder, described, ["pbkd", "torch"], model_id, run_id)
            client.log_model_artifacts(model_id, scratch)
        except (UserError, PermissionError) as error:  # the artifact is gone, or the server's place not ours
            log.warning("no files for %s in MLflow: %s", manifest.artifact[:12], error)


def _tags(manifest: Manifest, role: str) -> dict[str, str]:
    tags = {"pbkd.role": role}
    for name in ("test_accuracy", "val_accuracy", "macs", "params"):
        if (value := manifest.metrics.get(name)) is not None:
            tags[name] = str(value)
    return tags | {"pbkd.stage_key": manifest.key, "pbkd.artifact": manifest.artifact}


def _merit(version: "ModelVersion") -> tuple[float, float]:
    accuracy = float(version.tags.get("val_accuracy", -math.inf))
    return accuracy, -float(version.tags.get("macs", math.inf))
