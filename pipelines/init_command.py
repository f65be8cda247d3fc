"""`pbkd init`: a recipe for one's own network and data. Imports what is heavy only when called."""

from __future__ import annotations

import re
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.inspect_command import AllowImport

if TYPE_CHECKING:
    from torch import Tensor

    from pbkd.data import DataSettings

TEMPLATE = "recipe_template.yaml.jinja"
KNOWN_DATA = ("digits", "cifar10", "cifar100")
LARGE_SIDE = 128


def init(
    arch: Annotated[
        str,
        typer.Argument(
            metavar="ARCH", help="resnet56, torchvision/NAME, timm/NAME or package.module:function."
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="FOLDER|NAME", help="Folder with train/CLASS and val/CLASS; or digits, cifar10, cifar100."
        ),
    ],
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE[::KEY]", help="Your network's: safetensors, or by torch.save."),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="The library's own weights, for the same classes.")
    ] = False,
    image_size: Annotated[
        int | None, typer.Option(min=8, help="Height and width of a folder's images; default 224.")
    ] = None,
    accuracy: Annotated[
        float | None,
        typer.Option(
            min=0, max=100, help="What your weights reach on these test images, in percent: it is compared."
        ),
    ] = None,
    root: Annotated[Path, typer.Option(metavar="FOLDER", help="Where a CIFAR lies.")] = Path("data"),
    epochs: Annotated[int, typer.Option(min=1, help="Of distillation, the longest stage.")] = 20,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml", help="Default: NAME.yaml, by network and data.", show_default=False
        ),
    ] = None,
    allow_import: AllowImport = False,
) -> None:
    """Write a recipe, with comments, that makes a network smaller; what it names is tried out before.

    Without weights the network is trained first.
    """
    from pbkd.errors import UserError

    if weights is not None and pretrained:
        raise UserError("--pretrained: --weights gives the network's weights already; leave one of them out")
    if weights is not None and not weights.is_file() and "::" not in str(weights):
        raise UserError(f"--weights {weights}: no such file; give one, absolute or relative to here")
    if accuracy is not None and weights is None and not pretrained:
        raise UserError("--accuracy: of which weights? add --weights FILE or --pretrained")
    place = _place(data, root)
    name = "_".join(
        re.sub(r"\W+", "_", part).strip("_").lower() for part in (re.split("[/:]", arch)[-1], Path(data).name)
    )
    path = out or Path(f"{name}.yaml")
    if path.exists():
        raise UserError(f"{path}: is there already; remove it, or name another file with --out")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or name another file with --out")
    settings, why = _data_settings(data, place, arch, image_size, pretrained)
    text = _render(path, name, arch, settings, why, place, weights, pretrained, epochs)
    notes = _try_out(text, weights, accuracy)
    path.write_text(text, encoding="utf-8")
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    command = shlex.join(["pbkd", "plan", str(path)])
    typer.echo(f"{path}\nnext:  {command}    {command.replace(' plan ', ' run ', 1)}")


def _place(data: str, root: Path) -> Path | None:
    """Where the data lie, as it was typed; None for those that are in memory."""
    from pbkd.errors import UserError

    if data in KNOWN_DATA:
        return None if data == "digits" else root
    if not Path(data).is_dir():
        raise UserError(
            f"--data {data}: no such folder; give one with train/CLASS and val/CLASS, or one of "
            f"{', '.join(KNOWN_DATA)}"
        )
    return Path(data)


def _data_settings(
    data: str, place: Path | None, arch: str, image_size: int | None, pretrained: bool
) -> tuple[DataSettings, str]:
    """The settings, and where their way of seeing images comes from."""
    from pydantic import ValidationError

    from pbkd.data import DataSettings
    from pbkd.errors import UserError
    from pipelines.images_seen import settings_for

    name: Any = data
    try:
        if data in KNOWN_DATA:
            return DataSettings(name=name, root=place, image_size=image_size), "the data set's usual"
        assert place is not None, "a folder is a place"
        return settings_for(place, arch, image_size, pretrained)
    except ValidationError as error:
        raise UserError(f"--data {data}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error


def _render(
    path: Path,
    name: str,
    arch: str,
    settings: DataSettings,
    why: str,
    place: Path | None,
    weights: Path | None,
    pretrained: bool,
    epochs: int,
) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from pbkd.networks import architecture, settings_of

    info = settings.describe()
    blocks = len(architecture(settings_of(arch), info.input_shape, info.num_classes).blocks)
    block_epochs, recovery = max(1, epochs // 10), max(1, epochs // 2)
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return templates.get_template(TEMPLATE).render(
        path=path,
        name=name,
        arch=arch,
        data=settings.name,
        root=None if place is None else str(place),
        splits={name: place for name, place in settings.splits if place is not None},
        usual_splits=settings.splits == type(settings.splits)(),
        seen=settings.preprocessing(),
        augment=settings.augmentation,
        why=why,
        channels=info.input_shape[0],
        side=info.input_shape[1],
        classes=info.num_classes,
        batch_size=32 if info.input_shape[1] >= LARGE_SIDE else 64,
        weights=None if weights is None else str(weights),
        pretrained=pretrained,
        epochs=epochs,
        block_epochs=block_epochs,
        recovery_epochs=recovery,
        total=blocks * block_epochs + 1 + epochs + 1 + recovery,
    )


def _try_out(text: str, weights: Path | None, accuracy: float | None) -> list[str]:
    """Plan the recipe, load the weights, and compare the network with the user's own, and their `accuracy`.

    Returns how it trains otherwise than a copy. Raises UserError for whatever does not fit.
    """
    from pbkd.networks import TracedSpec, load_weights
    from pbkd.networks.builders import pretrained_tensors
    from pbkd.networks.equality import require_equal, require_exact
    from pbkd.networks.training_differences import trained_otherwise
    from pbkd.networks.weights import empty
    from pbkd.storage import user_cache
    from pbkd.weight_files import read_tensors
    from pipelines.graph import build_graph
    from pipelines.images_seen import compare_accuracy
    from pipelines.recipe_file import load_recipe

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        recipe = load_recipe(file)
        graph = build_graph(recipe, None, user_cache())
    spec = graph.nodes[graph.teacher].spec
    network, unused = None, None
    if weights is not None and spec is not None:
        network = empty(spec)
        unused = load_weights(network, read_tensors(weights, network), str(weights))
    elif accuracy is not None and spec is not None:
        network = empty(spec)
        load_weights(network, pretrained_tensors(spec.arch), spec.arch)
    notes = []
    if isinstance(spec, TracedSpec):
        images = _some_images(recipe.data)
        if network is None or weights is None:
            require_exact(spec, images)
        else:
            require_equal(network, spec, images, unused)
        notes = trained_otherwise(spec)
    if accuracy is not None and network is not None:
        notes.append(compare_accuracy(network, recipe.data, accuracy))
    return notes


def _some_images(settings: DataSettings) -> Tensor | None:
    """A few training images, (N, C, H, W); None, with a note, if there are none yet."""
    from pbkd.data import open_data
    from pbkd.errors import UserError
    from pbkd.networks.equality import BATCHES

    try:
        data = open_data(settings)
        reader = data.reader("train", min(max(BATCHES), data.sizes["train"]), 0, shuffle=True)
        try:
            return next(iter(reader))[0]
        finally:
            reader.close()
    except UserError as error:
        reason = str(error).partition("\n")[0]
        typer.echo(f"note: the network was compared on noise alone: {reason}", err=True)
        return None
