"""What a person sees first in the MLflow UI: accuracy against multiply-accumulates, with nothing to set up.

The compare page puts the first parameter, in ASCII order, on its x axis and the first metric on its y axis;
its parallel coordinates show the first three parameters that differ and the metric that was logged first of
those all runs have. So the facts of the network are logged as parameters with capital letters, the test
accuracy a second time as `accuracy`, and accuracies before other metrics.

The runs page has saved views, kept as tags of the experiment; ours gives it columns and charts. `pbkd ui`
links it.
"""

import base64
import json
import zlib
from typing import Any
from urllib.parse import quote

from pipelines.manifest import Manifest

HEADLINE = ("test_accuracy", "val_accuracy", "macs", "params", "macs_ratio", "params_ratio")

VIEW = "pbkd-accuracy-macs"
WORKFLOW = "workflowType=machine_learning"  # else the UI of MLflow 3 begins as one for language models
TRIAL_COLUMNS = ("val_accuracy", "macs", "macs_ratio", "params", "latency_ms", "stages_run", "seconds")
COLUMNS = ("test_accuracy", "macs", "macs_ratio", "params_ratio", "latency_ms", "agreement", "val_accuracy")


def headline_params(manifest: Manifest, name: str) -> dict[str, str]:
    """Return the parameters that come first everywhere: what the network costs, and the stage's name."""
    facts = {"MACs": manifest.metrics.get("macs"), "Parameters": manifest.metrics.get("params")}
    return {fact: str(value) for fact, value in facts.items() if value is not None} | {"Stage": name}


def view_url(server: str, experiment_id: str, charts: bool) -> str:
    """Return the address of the runs page in our view: the charts, or the table."""
    mode = "CHART" if charts else "TABLE"
    query = f"viewStateShareKey={VIEW}&compareRunsMode={mode}&{WORKFLOW}"
    return f"{server}/#/experiments/{experiment_id}/runs?{query}"


def compare_url(server: str, experiment_id: str, run_ids: list[str]) -> str:
    """Return the address of the page that compares `run_ids`."""
    runs, experiments = (quote(json.dumps(ids, separators=(",", ":"))) for ids in (run_ids, [experiment_id]))
    return f"{server}/#/compare-runs?runs={runs}&experiments={experiments}&{WORKFLOW}"


def run_url(server: str, experiment_id: str, run_id: str) -> str:
    """Return the address of the files of a run."""
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}/artifacts?{WORKFLOW}"


def _chart(kind: str, section: str, **settings: Any) -> dict[str, Any]:
    chart = {
        "uuid": f"{section}-{kind}-{settings.get('metricKey')}",
        "type": kind,
        "metricSectionId": section,
    }
    return chart | {"runsCountToCompare": 100, "deleted": False, "isGenerated": False} | settings


def search_view(search: str, keys: list[str]) -> tuple[str, str]:
    """Return the tag and the state of a saved view of a search's trials, compared by the searched `keys`."""
    columns = [*(f"params.`{key}`" for key in keys), *(f"metrics.`{name}`" for name in TRIAL_COLUMNS)]
    axes = {"xaxis": {"key": "macs", "type": "METRIC"}, "yaxis": {"key": "val_accuracy", "type": "METRIC"}}
    parallel = {"selectedParams": keys, "selectedMetrics": ["macs", "val_accuracy"]}
    charts = [
        _chart("SCATTER", "trade", **axes),
        _chart("PARALLEL", "trade", showAllRuns=True, **parallel),
    ]
    mine = f"tags.`pbkd.search` = '{search}' AND tags.`pbkd.role` = 'trial'"
    tag = f"mlflow.sharedViewState.pbkd-search-{search}"
    return tag, _state(f"Trials of {search}", mine, columns, {"trade": "Accuracy against MACs"}, charts)


def _view() -> str:
    columns = ["tags.`pbkd.role`", *(f"metrics.`{name}`" for name in COLUMNS)]
    axes = {"xaxis": {"key": "macs", "type": "METRIC"}, "yaxis": {"key": "test_accuracy", "type": "METRIC"}}
    parallel = {"selectedParams": ["Stage"], "selectedMetrics": ["macs", "params", "test_accuracy"]}
    charts = [
        _chart("SCATTER", "trade", **axes),
        _chart("PARALLEL", "trade", showAllRuns=True, **parallel),
        _chart("BAR", "stages", metricKey="test_accuracy"),
        _chart("BAR", "stages", metricKey="macs_ratio"),
    ]
    stages_only = " AND ".join(f"tags.`pbkd.role` != '{role}'" for role in ("pipeline", "trial", "search"))
    sections = {"trade": "Accuracy against MACs", "stages": "The stages"}
    return _state("Accuracy against MACs", stages_only, columns, sections, charts)


def _state(
    name: str, search: str, columns: list[str], sections: dict[str, str], charts: list[dict[str, Any]]
) -> str:
    """Return the state of the runs page, in the form the UI of MLflow 3.17 itself writes for a saved view."""
    section = {"display": True, "isReordered": True, "deleted": False, "isGenerated": False, "columns": 2}
    heights: dict[str, Any] = {"trade": {"cardHeight": 400}}
    state = {
        "searchFilter": search,
        "orderByKey": "metrics.`macs`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": {},
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,
        "compareRunSections": [
            section | {"uuid": uuid, "name": title} | heights.get(uuid, {})
            for uuid, title in sections.items()
        ],
        "compareRunCharts": charts,
    }
    packed = "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    return json.dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": packed})


EXPERIMENT_TAGS = {"pbkd.experiment": "true", f"mlflow.sharedViewState.{VIEW}": _view()}
