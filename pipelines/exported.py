"""An export, from a reference to a folder: the file, how it compares with the network, the model card."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pbkd import artifact
from pbkd.data import DataSettings, data_digest, open_data
from pbkd.data.datasets import CLASSES
from pbkd.data.folder import list_names
from pbkd.errors import UserError
from pbkd.export import INPUT, OPSET, ByPixels, Format, export, open_exported, to_pixels
from pbkd.measure import measure_latency
from pbkd.networks import BlockNetwork
from pbkd.parity import compare, images_to_compare
from pbkd.preprocessing import Preprocessing
from pbkd.storage import user_cache
from pipelines.lineage import chain, pipeline_of
from pipelines.manifest import Interface, Manifest
from pipelines.mlflow_model import serve_command, write_model
from pipelines.model_card import model_card
from pipelines.recipe_file import load_recipe
from pipelines.store import Store
from pipelines.tracking import default_uri

RECORD, CARD = "export.json", "README.md"
BATCH = 100
JOURNALED = (
    *("stage", "stage_key", "path", "format", "fp16", "dynamic_batch", "bytes"),
    *("max_abs_diff", "agreement", "images", "compared_on", "latency_ms", "threads"),
)


@dataclass(frozen=True)
class Wishes:
    """What was asked for; see `pbkd export --help`."""

    form: Format
    dynamic_batch: bool = False
    fp16: bool = False
    without_data: bool = False
    licence: str | None = None
    with_preprocessing: bool = False
    tolerance: float | None = None


@dataclass(frozen=True)
class Provenance:
    """Where a network comes from.

    Attributes:
        manifest: of the stage that made it.
        teacher: of the stage that it is compared with; None: it is the teacher.
        rows: its lineage, as `pbkd lineage --json` has it.
        pipeline: the id of the latest pipeline with this stage; None: the store has no record of one.
        recipe: the name of its recipe.
        data: what that recipe says of the data.
    """

    manifest: Manifest
    teacher: Manifest | None
    rows: list[dict[str, Any]]
    pipeline: str | None
    recipe: str | None
    data: DataSettings | None


def export_artifact(
    store: Store, reference: str, overrides: Sequence[str], wishes: Wishes, out: Path | None
) -> dict[str, Any]:
    """Export what `reference` names to the folder `out`, in which there may be an earlier export.

    Returns the facts that `export.json` holds; the journal of the network's pipeline gets the main ones.

    Raises:
        UserError: nothing fits `reference`, the data are not at hand, the folder is not an export's, or the
            network cannot be written in that format.
        StageError: the file does not compute what the network does.
    """
    if wishes.form == "safetensors" and wishes.with_preprocessing:
        raise UserError("--with-preprocessing: safetensors has weights alone; leave one of them out")
    origin = _provenance(store, reference, overrides)
    folder = (out or Path("exports") / _name(origin, wishes)).absolute()
    if folder.exists() and not (folder / RECORD).is_file():
        raise UserError(f"{folder}: is there, and no export of pbkd's; choose another folder with --out")
    network = artifact.load(store.artifact(origin.manifest.artifact))
    images = _noise(network, origin) if wishes.without_data else _test_images(store, origin)
    scratch = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    try:
        scratch.mkdir(parents=True)
        facts = _write(network, images, origin, wishes, scratch)
        (scratch / RECORD).write_text(json.dumps(facts, indent=1) + "\n")
        served = serve_command(folder) if (scratch / "MLmodel").is_file() else None
        facts |= {"path": str(folder / facts["file"]), "card": str(folder / CARD), "serve": served}
        (scratch / CARD).write_text(model_card(facts, origin.manifest, origin.teacher, origin.rows))
        if folder.exists():
            folder.rename(scratch / "before")
        scratch.rename(folder)
        shutil.rmtree(folder / "before", ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if origin.pipeline is not None and not store.is_write_protected:
        store.journal(origin.pipeline).append({"type": "export"} | {name: facts[name] for name in JOURNALED})
    return facts


def _provenance(store: Store, reference: str, overrides: Sequence[str]) -> Provenance:
    for override in overrides:
        if not override.startswith("data."):
            raise UserError(f"override '{override}': only the data can be elsewhere now: data.root=DIR")
    rows = chain(store, reference, default_uri(store))
    manifest = store.manifest(rows[0]["key"])
    assert manifest is not None, "its row was made from it"
    key = next((given.key for given in manifest.inputs if given.role == "teacher"), None)
    pipeline_id = pipeline_of(store, manifest.key)
    if pipeline_id is None:
        return Provenance(manifest, store.manifest(key) if key else None, rows, None, None, None)
    recipe = load_recipe(store.recipe(pipeline_id), overrides).shrunk()
    teacher = store.manifest(key) if key else None
    return Provenance(manifest, teacher, rows, pipeline_id, recipe.name, recipe.data)


def _name(origin: Provenance, wishes: Wishes) -> str:
    parts = [origin.recipe or "network", origin.rows[0]["stage"], origin.manifest.artifact[:8], wishes.form]
    return "-".join([*parts, "fp16"] if wishes.fp16 else parts)


def _write(
    network: BlockNetwork, images: Tensor, origin: Provenance, wishes: Wishes, folder: Path
) -> dict[str, Any]:
    """Write the file, and what MLflow needs beside it; compare and time what was written."""
    form, manifest = wishes.form, origin.manifest
    file = folder / f"model.{form}"
    interface = manifest.interface or _interface(origin.data)
    if interface is None and wishes.with_preprocessing:
        raise UserError(
            "--with-preprocessing: how this network sees images is not on record: its store has no recipe\n"
            "cure: export without it"
        )
    described = _described(network, interface, wishes)
    seen = interface.preprocessing if interface is not None and wishes.with_preprocessing else None
    about = {"pbkd.artifact": manifest.artifact, "pbkd.interface": json.dumps(described)}
    export(
        network,
        file,
        form,
        dynamic_batch=wishes.dynamic_batch,
        fp16=wishes.fp16,
        metadata=about,
        preprocessing=seen,
    )
    if form == "onnx" and interface is not None:
        served = described | {"dynamic_batch": wishes.dynamic_batch, "outputs": network.spec.num_classes}
        pixels = to_pixels(images[:1], interface.preprocessing).numpy()
        write_model(folder, served, ["onnxruntime"], pixels=pixels)
    threads = int(manifest.compute.get("threads") or torch.get_num_threads())
    exported = open_exported(file, form)
    exported = exported if seen is None else ByPixels(exported, seen)
    takes_one = not wishes.dynamic_batch and form != "safetensors"
    parity = compare(
        network,
        exported,
        images.split(BATCH),
        one_by_one=takes_one,
        fp16=wishes.fp16,
        tolerance=wishes.tolerance,
    )
    return {
        "file": file.name,
        "format": form,
        "bytes": file.stat().st_size,
        **asdict(parity),
        "compared_on": "images of noise" if wishes.without_data else "test images",
        "latency_ms": None
        if form == "safetensors"
        else _latencies(network, open_exported(file, form, threads), seen, threads),
        "threads": threads,
        "opset": OPSET if form == "onnx" else None,
        "fp16": wishes.fp16,
        "dynamic_batch": wishes.dynamic_batch,
        **described,
        "arch": network.spec.arch,
        "recipe": origin.recipe,
        "stage": origin.rows[0]["stage"],
        "stage_key": manifest.key,
        "artifact": manifest.artifact,
        "test_accuracy": manifest.metrics.get("test_accuracy"),
        "data": None if origin.data is None else origin.data.name,
        "data_licence": wishes.licence,
    }


def _interface(data: DataSettings | None) -> Interface | None:
    """How a network sees images, by its recipe: manifests from before it was kept do not say."""
    if data is None:
        return None
    try:
        classes = (
            list_names(data.data_root(), data.splits.train) if data.name == "folder" else CLASSES[data.name]
        )
    except UserError:  # they are not here
        classes = ()
    return Interface(preprocessing=data.preprocessing(), classes=classes)


def _described(network: BlockNetwork, interface: Interface | None, wishes: Wishes) -> dict[str, Any]:
    """What somebody who has but the file must know to use it."""
    shape = list(network.spec.input_shape)
    return {
        "input": INPUT,
        "input_shape": [*shape[1:], shape[0]] if wishes.with_preprocessing else shape,
        "input_type": "uint8" if wishes.with_preprocessing else "float32",
        "preprocessing": None if interface is None else interface.preprocessing.model_dump(mode="json"),
        "classes": list(interface.classes) if interface is not None and interface.classes else None,
    }


def _test_images(store: Store, origin: Provenance) -> Tensor:
    """So many test images that comparing takes seconds, of the very data that the stage was trained on."""
    manifest, cure = (
        origin.manifest,
        "name their folder by data.root=DIR, or compare on noise: --without-data",
    )
    if origin.data is None:
        raise UserError(
            f"stage {manifest.key[:12]}: no pipeline in {store.location} says which data it is of\n"
            "use the store it was run in (--store DIR), or compare on noise: --without-data"
        )
    try:
        digest = data_digest(origin.data, user_cache())
    except UserError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the test images to compare on are not at hand: {reason}\n{cure}") from error
    if manifest.data_digest not in (None, digest):
        raise UserError(
            f"data.root={origin.data.root}: these are other data ({digest[:12]}) than the network's "
            f"({manifest.data_digest[:12] if manifest.data_digest else None})\n{cure}"
        )
    count = images_to_compare(int(manifest.metrics.get("macs") or 0))
    settings = origin.data.model_copy(update={"limit": min(count, origin.data.limit or count)})
    data = open_data(settings, digest, user_cache())
    reader = data.reader("test", BATCH, seed=0)
    try:
        return torch.cat([images for images, _ in reader])
    finally:
        reader.close()


def _noise(network: BlockNetwork, origin: Provenance) -> Tensor:
    """Images of random pixels, normalized."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (BATCH, *network.spec.input_shape), generator=random) / 255
    interface = origin.manifest.interface or _interface(origin.data)
    if interface is None:
        return (pixels - 0.5) / 0.25
    seen = interface.preprocessing
    mean, std = (torch.tensor(row).view(1, -1, 1, 1) for row in (seen.mean, seen.std))
    return (pixels - mean) / std


def _latencies(
    network: BlockNetwork, exported: nn.Module, seen: Preprocessing | None, threads: int
) -> dict[str, float]:
    """Medians of one image at a time."""
    shape = network.spec.input_shape
    timed = {"file": exported if seen is None else ByPixels(exported, seen), "pytorch": network}
    return {by: measure_latency(module, shape, threads=threads).median_ms for by, module in timed.items()}
