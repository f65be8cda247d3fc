"""The model registry: students and baselines of a recipe, a version an artifact, the best as champion."""

import math
from typing import TYPE_CHECKING

from pipelines.store import Manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"


def register(
    client: "MlflowClient", recipe: str, role: str, manifest: Manifest, run_id: str, model_id: str
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
            recipe, description=f"Students and baselines of recipe {recipe}."
        )
    versions = {
        version.tags.get("pbkd.artifact", ""): version
        for version in client.search_model_versions(f"name = '{recipe}'", max_results=1000)
    }
    version = versions.get(manifest.artifact)
    if version is None:
        # The artifact lies in the store, which a server may not see: the logged model stands for it.
        version = client.create_model_version(
            recipe,
            source=client.get_logged_model(model_id).artifact_location,
            run_id=run_id,
            tags=_tags(manifest, role),
            await_creation_for=0,
            model_id=model_id,
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


def _tags(manifest: Manifest, role: str) -> dict[str, str]:
    tags = {"pbkd.role": role}
    for name in ("test_accuracy", "val_accuracy", "macs", "params"):
        if (value := manifest.metrics.get(name)) is not None:
            tags[name] = str(value)
    return tags | {"pbkd.stage_key": manifest.key, "pbkd.artifact": manifest.artifact}


def _merit(version: "ModelVersion") -> tuple[float, float]:
    accuracy = float(version.tags.get("val_accuracy", -math.inf))
    return accuracy, -float(version.tags.get("macs", math.inf))
