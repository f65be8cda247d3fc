"""Whether networks of torchvision and timm, in blocks, compute what they do, and which channels can go.

    python -m benchmarks.copies [NAME...]

Each is compared with the library's own module (`pbkd.networks.equality`), and the channels of each block are
silenced and removed (`pbkd.networks.channels`). Appends a row for each to benchmarks/results/copies.csv.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from importlib.metadata import version
from pathlib import Path

from pbkd.errors import UserError
from pbkd.networks import TracedSpec, architecture, settings_of
from pbkd.networks.channels import inner_groups, left_alone
from pbkd.networks.equality import require_exact

RESULTS = Path(__file__).parent / "results" / "copies.csv"
COLUMNS = (
    "network",
    "image",
    "copy",
    "blocks",
    "groups",
    "left_alone",
    "blocks_kept_whole",
    "seconds",
    "library",
)
NETWORKS = {
    "torchvision": [
        "alexnet",
        "vgg11_bn",
        "resnet18",
        "resnet50",
        "resnext50_32x4d",
        "wide_resnet50_2",
        "squeezenet1_1",
        "densenet121",
        "googlenet",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "mobilenet_v3_large",
        "mnasnet0_5",
        "shufflenet_v2_x0_5",
        "efficientnet_b0",
        "regnet_y_400mf",
        "regnet_x_400mf",
        "convnext_tiny",
    ],
    "timm": [
        "dm_nfnet_f0",
        "nf_resnet26",
        "resnetv2_50",
        "resnet10t",
        "resnet26d",
        "seresnet18",
        "ecaresnet26t",
        "skresnet18",
        "resnest14d",
        "res2net50_26w_4s",
        "cspresnet50",
        "cs3darknet_s",
        "darknet53",
        "dla34",
        "dpn48b",
        "ese_vovnet19b_slim",
        "ghostnet_050",
        "gernet_s",
        "repvgg_a0",
        "tf_efficientnet_lite0",
        "mixnet_s",
        "hardcorenas_a",
        "lcnet_035",
        "fasternet_t0",
        "convnext_atto",
        "inception_v3",
        "xception41",
        "rexnet_100",
    ],
}
SIDES = {"inception_v3": 299, "xception41": 299, "dm_nfnet_f0": 192}


def row_of(library: str, name: str) -> dict[str, object]:
    """Try one network out."""
    began, side = time.monotonic(), SIDES.get(name, 224)
    row: dict[str, object] = {
        "network": f"{library}/{name}",
        "image": side,
        "library": f"{library} {version(library)}",
    }
    try:
        spec = architecture(settings_of(f"{library}/{name}"), (3, side, side), 1000)
        assert isinstance(spec, TracedSpec)
        require_exact(spec)
        row |= {"copy": "equal", "blocks": len(spec.blocks)} | _channels(spec)
    except UserError as error:
        row["copy"] = f"refused: {error}".replace("\n", " ")
    return row | {"seconds": round(time.monotonic() - began, 1)}


def _channels(spec: TracedSpec) -> dict[str, object]:
    groups = alone = whole = 0
    for index in range(len(spec.blocks)):
        try:
            groups += len(inner_groups(spec, index))
            alone += len(left_alone(spec, index))
        except UserError:
            whole += 1
    return {"groups": groups, "left_alone": alone, "blocks_kept_whole": whole}


def main() -> None:
    """The command."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("names", nargs="*", metavar="NAME", help="as in network.arch; default: 46 of both")
    wanted = parser.parse_args().names or [
        f"{library}/{name}" for library in NETWORKS for name in NETWORKS[library]
    ]
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        for library, _, name in (each.partition("/") for each in wanted):
            row = row_of(library, name)
            writer.writerow(row)
            file.flush()
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
