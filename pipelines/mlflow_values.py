"""Settings and manifests as what MLflow takes: parameters, metrics, one call to write them."""

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pipelines.manifest import Manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Turn nested settings into parameters: names joined by dots, lists as JSON, what is not set left out."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        elif value is not None:
            is_plain = isinstance(value, str)
            flat[prefix + name] = value if is_plain else json.dumps(value, separators=(",", ":"), default=str)
    return flat


def final_metrics(
    values: dict[str, float | int | None], manifest: Manifest, model_id: str | None = None
) -> list["Metric"]:
    """Give final values the manifest's own time and last step, so that writing them again adds nothing."""
    from mlflow.entities import Metric

    step = max((int(row["step"] or 0) for row in manifest.history), default=0)
    moment = int(manifest.created * 1000)
    return [
        Metric(name, float(value), moment, step, model_id=model_id)
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    ]


def log_run(
    client: "MlflowClient",
    run_id: str,
    metrics: Iterable["Metric"] = (),
    params: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
) -> None:
    """Write all of it by one call (for each thousand metrics)."""
    from mlflow.entities import Param, RunTag

    client.log_batch(
        run_id,
        list(metrics),
        [Param(name, value) for name, value in (params or {}).items()],
        [RunTag(name, value) for name, value in (tags or {}).items()],
    )
