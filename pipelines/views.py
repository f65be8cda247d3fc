"""What a person sees first in the MLflow UI: accuracy against multiply-accumulates, with nothing to set up.

The compare page puts the first parameter, in ASCII order, on its x axis and the first metric on its y axis;
its parallel coordinates show the first three parameters that differ and the first metric. So the facts of the
network are logged as parameters with capital letters, and the test accuracy a second time as `accuracy`.
"""

from pipelines.store import Manifest

HEADLINE = ("test_accuracy", "val_accuracy", "macs", "params", "macs_ratio", "params_ratio")

EXPERIMENT_TAGS = {"pbkd.experiment": "true"}


def headline_params(manifest: Manifest, name: str) -> dict[str, str]:
    """Return the parameters that come first everywhere: what the network costs, and the stage's name."""
    facts = {"MACs": manifest.metrics.get("macs"), "Parameters": manifest.metrics.get("params")}
    return {fact: str(value) for fact, value in facts.items() if value is not None} | {"Stage": name}
