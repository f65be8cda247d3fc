"""Attacks on what pbkd reads: nothing is executed, and no name leads out of the store."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from pbkd import artifact
from pbkd.errors import UserError
from pbkd.networks import fresh
from pipelines.cli import main
from pipelines.jobs import _load
from pipelines.recipe import load_recipe
from pipelines.store import Store
from tests.unit.small_networks import small_resnet, small_vgg
from tests.unit.test_store import KEY, lease_of, manifest_of

RECIPE = """
name: small
data: {name: digits, limit: 100}
compute: {executor: local, threads: 1}
teacher: teacher
student: teacher
stages:
  teacher: {kind: train, network: {arch: resnet20}, steps: 2}
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with one finished stage, KEY."""
    store = Store(tmp_path / "runs")
    folder = store.scratch()
    saved = artifact.save(fresh(small_resnet(base_width=4), 0), folder)
    store.add_artifact(folder, saved.digest)
    lease = lease_of(store)
    store.publish(manifest_of(artifact=saved.digest, digest=saved.weights_digest), lease)
    lease.release()
    return store


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_flipped_byte_anywhere_in_an_artifact_is_an_error_that_names_file_and_cure(store: Store) -> None:
    assert _load(store, KEY).spec == small_resnet(base_width=4)
    (folder,) = (store.root / "artifacts").iterdir()
    for name in ("weights.safetensors", "spec.json"):
        whole = (folder / name).read_bytes()
        draw = random.Random(0)
        probe = whole.find(b'"probe"') if name == "spec.json" else len(whole)  # compared with a tolerance
        for position in draw.sample(range(probe), 25):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << draw.randrange(7)
            (folder / name).write_bytes(flipped)
            if name == "spec.json" and _same_json(whole, bytes(flipped)):
                continue  # a space became another one
            with pytest.raises(UserError) as error:
                _load(store, KEY)
            assert str(folder) in str(error.value), position
            assert f"pbkd store drop {KEY} --store {store.root}" in str(error.value)
        (folder / name).write_bytes(whole)


def _same_json(first: bytes, second: bytes) -> bool:
    try:
        return bool(json.loads(first) == json.loads(second))
    except ValueError:
        return False


def test_a_sound_network_put_in_the_place_of_another_is_refused(store: Store) -> None:
    (folder,) = (store.root / "artifacts").iterdir()
    shutil.rmtree(folder)
    artifact.save(fresh(small_vgg(norm=False), 0), folder)
    with pytest.raises(UserError, match="holds another network"):
        _load(store, KEY)


SPECS: dict[str, Callable[[Any], object]] = {
    "a kind of unit that is a path": lambda spec: spec["blocks"][0]["units"][0].update(kind="../../evil"),
    "a kind of unit to import": lambda spec: spec["blocks"][0]["units"][0].update(kind="os:system"),
    "a builder": lambda spec: spec.update(builder="os.system"),
    "an absurd channel": lambda spec: spec["stem"]["layers"][0].update(in_channels=-1),
    "no network at all": lambda spec: spec.clear(),
}


@pytest.mark.parametrize("what", SPECS)
def test_a_spec_is_limited_to_what_pbkd_builds_though_its_digest_fits(store: Store, what: str) -> None:
    (folder,) = (store.root / "artifacts").iterdir()

    def attack(description: Any) -> None:
        SPECS[what](description["network"])
        description["digest"] = artifact._digest(description["network"], description["weights_digest"])

    edit(folder / "spec.json", attack)
    with pytest.raises(UserError, match="not a pbkd architecture spec"):
        artifact.load(folder)


@pytest.mark.parametrize("value", ["../../../etc", "/etc/passwd", "..", "", "AB" * 32, "ab/../" * 8, None, 3])
@pytest.mark.parametrize("name", ["artifact", "digest", "key", "inputs"])
def test_a_manifest_that_points_out_of_the_store_is_refused(store: Store, name: str, value: object) -> None:
    edit(
        Path(store.manifest_location(KEY)),
        lambda content: content.update(
            {name: [{"role": "from", "key": value}] if name == "inputs" else value}
        ),
    )
    with pytest.raises(UserError, match=r"(?s)manifests/abab.*delete it: the stage will run again"):
        store.manifest(KEY)


def test_a_manifest_under_the_name_of_another_is_refused(store: Store) -> None:
    other = "cd" * 32
    shutil.copy(Path(store.manifest_location(KEY)), Path(store.manifest_location(other)))
    with pytest.raises(UserError, match=f"the manifest of another stage, {KEY[:12]}"):
        store.manifest(other)


PYTHON_TAGS = [
    "!!python/object/apply:os.system ['touch {sprung}']",
    "!!python/object/new:os.system ['touch {sprung}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object/apply:subprocess.check_output [[touch, {sprung}]]",
]


@pytest.mark.parametrize("tag", PYTHON_TAGS)
def test_yaml_runs_nothing(tag: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sprung, recipe = tmp_path / "sprung", tmp_path / "recipe.yaml"
    said = tag.format(sprung=sprung)
    recipe.write_text(RECIPE.replace("name: small", f"name: {said}"))
    assert main(["plan", str(recipe)]) == 2
    recipe.write_text(RECIPE)
    assert main(["plan", str(recipe), f"seed={said}"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err and err.count("error: ") == 2
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["../out", "..", ".hidden", "a/b", "/tmp/out", "a\nb", ""])
def test_no_name_in_a_recipe_becomes_a_path_out_of_the_store(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    with pytest.raises(UserError, match="'name'"):
        load_recipe(recipe, [f"name={json.dumps(name)}"])
    recipe.write_text(RECIPE.replace("  teacher: {kind", f"  {json.dumps(name)}: {{kind"))
    with pytest.raises(UserError, match="expected a name of letters"):
        load_recipe(recipe)


def test_weights_are_read_as_safetensors_whatever_they_are_called(tmp_path: Path) -> None:
    """The path is the user's to choose: wherever it leads, it is data."""
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        artifact.read_tensors(Path("/etc/passwd"))
    save_file({}, tmp_path / "empty.safetensors")
    assert artifact.read_tensors(tmp_path / "empty.safetensors") == {}
