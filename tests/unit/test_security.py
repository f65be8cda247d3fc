"""Attacks on what pbkd reads: nothing is executed, and no name leads out of the store."""

import json
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from pbkd import artifact
from pbkd.data.beton import BetonManifest, BetonSettings, manifest_path, read_manifest
from pbkd.errors import UserError
from pbkd.networks import fresh
from pipelines.cli import main
from pipelines.jobs import _load
from pipelines.projection import log_report
from pipelines.ray_executor import _token
from pipelines.recipe_file import load_recipe
from pipelines.run import _made_report
from pipelines.store import Store
from pipelines.tracking import _report_digest
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


@pytest.mark.parametrize("name", ["../../victim", "a/../../../victim", "{victim}", "..", "", 3, None])
def test_a_journal_that_names_files_elsewhere_has_none_of_them_read_or_written(
    name: object,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`store replay`, `ui` and `run` copy a report to a folder, and from there to MLflow."""
    victim, sent = tmp_path / "one" / "victim", store.root / "victim"
    for path, content in ((victim, "mine"), (sent, "the attacker's")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    (tmp_path / "one" / "two").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "one" / "two"))
    record = {
        "type": "report",
        "digest": "0",
        "summary": "",
        "files": [name.format(victim=sent) if isinstance(name, str) else name],
    }
    store.pipeline("aabbcc")
    store.journal("aabbcc").append(record)
    client: Any = None  # it is never asked
    with caplog.at_level(logging.WARNING):
        assert not log_report(client, "run", store.records("aabbcc"), record)
    assert "pbkd report makes the report anew" in caplog.text
    assert _made_report(store, "aabbcc") is None and _report_digest(store.records("aabbcc"), "report") is None
    assert victim.read_text() == "mine" and sent.read_text() == "the attacker's"


@pytest.mark.parametrize(
    "uri",
    ["https://user:hunter2@mlflow.example.org", "https://hunter2@example.org", "mysql://me:hunter2@db/x"],
)
def test_a_secret_in_the_address_of_mlflow_is_refused_and_not_repeated(
    uri: str, store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    here = ["--store", str(store.root)]
    for command in (
        ["run", str(tmp_path / "recipe.yaml"), f"tracking.uri={uri}", *here],
        ["store", "replay", "--uri", uri, *here],
        ["ui", "--uri", uri, *here],
    ):
        assert main(command) == 2
        out, err = capfd.readouterr()
        assert "MLFLOW_TRACKING_PASSWORD in the environment" in err and len(err.splitlines()) <= 3
        assert "hunter2" not in out + err
    assert not list(store.root.glob("pipelines/*"))


def test_a_token_that_others_may_know_or_have_chosen_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = _token(store)
    assert token == _token(store) and len(token.read_text()) == 64 and token.stat().st_mode & 0o777 == 0o600
    for mode in (0o640, 0o604, 0o602):
        token.chmod(mode)
        with pytest.raises(UserError, match=rf"(?s)ray-token.*found mode {mode:04o}.*remove it"):
            _token(store)
    token.chmod(0o600)
    elsewhere = token.rename(store.root / "elsewhere")
    token.symlink_to(elsewhere)
    with pytest.raises(UserError, match="must be your own file"):
        _token(store)
    token.unlink()
    assert _token(store).read_text() != elsewhere.read_text()
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(UserError, match="must be your own file"):
        _token(store)


@pytest.mark.parametrize("name", ["../outside.jpeg", "/etc/passwd", "train/../../outside.jpeg", ".."])
def test_a_beton_manifest_names_no_image_outside_of_the_data_set_though_its_seal_fits(
    name: str, tmp_path: Path
) -> None:
    sound = BetonManifest(
        name="folder", split="train", bytes=1, sha256="", tables="", samples=1, classes=1, class_names=("a",),
        settings=BetonSettings(), shape=None, source_digest="", broken=("train/a/..jpeg",),
    )  # fmt: skip
    beton = tmp_path / "train.beton"
    for manifest in (sound.sealed(), sound.model_copy(update={"broken": (name,)}).sealed()):
        assert manifest.is_sealed
        manifest_path(beton).write_text(manifest.model_dump_json())
        if manifest.broken == sound.broken:
            assert read_manifest(beton).broken == sound.broken
            continue
        with pytest.raises(UserError, match="not below the data set's root"):
            read_manifest(beton)
