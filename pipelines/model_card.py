"""The model card beside an exported file: what it is, how to run it, how good it is, where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.manifest import Manifest
from pipelines.quantities import human

TEMPLATE = "model_card.md.jinja"
LICENCES = {
    "digits": "Optical Recognition of Handwritten Digits (Alpaydin, Kaynak; UCI, 1998): CC BY 4.0",
    "cifar10": "CIFAR-10 (Krizhevsky, 2009): its authors state no licence, and ask to be cited",
    "cifar100": "CIFAR-100 (Krizhevsky, 2009): its authors state no licence, and ask to be cited",
}
UNKNOWN = "not known to pbkd; say it with --licence before you pass the file on"
QUALITIES = (
    ("test accuracy, %", "test_accuracy", "{:.2f}"),
    ("among the best five, %", "test_top5", "{:.2f}"),
    ("negative log-likelihood", "nll", "{:.4f}"),
    ("calibration error, %", "ece", "{:.2f}"),
    ("same class as the teacher, %", "agreement", "{:.2f}"),
    ("parameters", "params", None),
    ("multiply-accumulates", "macs", None),
)


def model_card(
    facts: Mapping[str, Any],
    manifest: Manifest,
    teacher: Manifest | None,
    rows: Sequence[Mapping[str, Any]],
) -> str:
    """Markdown about an export: `facts` are those of `export.json`, `rows` the lineage."""
    networks = {"this network": manifest.metrics} | ({"teacher": teacher.metrics} if teacher else {})
    table = [
        (label, [_cell(metrics.get(name), form) for metrics in networks.values()])
        for label, name, form in QUALITIES
    ]
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    return templates.get_template(TEMPLATE).render(
        facts=facts,
        fewer=manifest.metrics.get("macs_ratio") or 1.0,
        shape=(1, *facts["input_shape"]),
        seen=facts["preprocessing"],
        filter=(facts["preprocessing"] or {}).get("interpolation", "").upper(),
        networks=list(networks),
        table=table,
        data_digest=manifest.data_digest,
        licence=facts["data_licence"] or LICENCES.get(facts["data"], UNKNOWN),
        rows=rows,
        names={row["key"]: row["stage"] for row in rows},
    )


def _cell(value: float | None, form: str | None) -> str:
    if value is None:
        return ""
    return human(value) if form is None else form.format(value)
