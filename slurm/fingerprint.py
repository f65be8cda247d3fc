"""What results depend on besides the recipe: Python, packages, pbkd's own code; here and elsewhere."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import sys
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "numpy", "torch-pruning", "safetensors", "submitit")
ROOMS = ("pbkd", "pipelines", "tune_spaces", "slurm")


@dataclass(frozen=True)
class Fingerprint:
    """A Python environment; two that are equal compute the same."""

    python: str
    packages: dict[str, str]
    code: str

    @classmethod
    def here(cls) -> Fingerprint:
        """Of this process."""
        return cls(platform.python_version(), {name: _version(name) for name in PACKAGES}, _code())

    def differences(self, other: Fingerprint) -> list[str]:
        """What `other` has else than this one, in words; empty if nothing."""
        found = []
        if self.python != other.python:
            found.append(f"Python {other.python} instead of {self.python}")
        found += [
            f"{name} {other.packages.get(name, 'missing')} instead of {here}"
            for name, here in self.packages.items()
            if other.packages.get(name) != here
        ]
        if self.code != other.code:
            found.append("another version of pbkd's code")
        return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


@cache
def _code() -> str:
    """A digest of all of pbkd's modules."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def main() -> None:
    """Print a line of JSON: this machine's name and environment, and which of the given paths it lacks."""
    missing = [path for path in sys.argv[1:] if not Path(path).exists()]
    report = {"host": socket.gethostname(), "fingerprint": asdict(Fingerprint.here()), "missing": missing}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
