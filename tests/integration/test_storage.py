"""What a storage promises, held by a folder and by a bucket of a real S3 server alike."""

import multiprocessing
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from pbkd import artifact
from pbkd.errors import UserError
from pbkd.networks import fresh
from pbkd.storage import Folder, Storage, Unreachable
from pipelines import object_storage
from pipelines.cli import main
from pipelines.lease import Fenced, held, try_acquire
from pipelines.store import Store, open_storage
from pipelines.store_check import check
from tests.integration.s3_server import BUCKET, CARELESS, client, s3_server
from tests.unit.small_networks import small_resnet
from tests.unit.test_store import ARTIFACT, KEY, lease_of, manifest_of

PREFIX = f"s3://{BUCKET}/some/prefix"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server(tmp_path_factory.mktemp("cache")) as environment:
        yield environment


@pytest.fixture
def s3(server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty store."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"{PREFIX}/{tmp_path.name}"


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return Folder(tmp_path / "folder")
    return open_storage(request.getfixturevalue("s3"))


def test_the_server_refuses_to_overwrite_what_a_put_must_not_find(s3: str, server: dict[str, str]) -> None:
    other = client(server["AWS_ENDPOINT_URL"])
    wanted = {"Bucket": BUCKET, "Key": s3, "Body": b"x", "IfNoneMatch": "*"}
    other.put_object(**wanted)
    with pytest.raises(ClientError) as error:
        other.put_object(**wanted)
    assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412


@pytest.mark.parametrize("bucket", CARELESS)
def test_a_bucket_in_which_two_could_own_one_stage_or_lose_a_line_is_refused(bucket: str, s3: str) -> None:
    condition = {"careless-create": "If-None-Match", "careless-append": "If-Match"}[bucket]
    with pytest.raises(UserError, match=rf"(?s)\({condition}.*docs/stores\.md"):
        Store(f"s3://{bucket}/{s3.rpartition('/')[2]}")


def test_it_keeps_reads_lists_and_removes(storage: Storage) -> None:
    assert storage.names() == [] and storage.names("none") == []
    with pytest.raises(FileNotFoundError, match="a/b"):
        storage.read("a/b")
    assert storage.create("a/b", b"first") and not storage.create("a/b", b"second")
    storage.replace("a/c/d", b"0123456789")
    storage.replace("a/c/d", b"01234")
    assert storage.read("a/b") == b"first"
    assert [storage.read("a/c/d", start) for start in (2, 5, 9)] == [b"234", b"", b""]
    assert storage.names() == ["a"] and storage.names("a") == ["b", "c"]
    below = pickle.loads(pickle.dumps(storage.below("a")))
    assert below.names() == ["b", "c"] and below.location("b") == storage.location("a/b")
    assert storage.stat("a/c/d").size == 5 and storage.stat("a").size == 10
    assert abs(storage.stat("a/b").modified - time.time()) < 3600
    with pytest.raises(FileNotFoundError):
        storage.stat("b")
    storage.remove("a/c")
    storage.remove("a/c")
    assert storage.names("a") == ["b"] and storage.leftovers() == []


def test_a_folder_is_added_whole_and_copied_to_where_it_is_read(storage: Storage) -> None:
    storage.prepare("blobs")
    assert storage.names() == ["blobs"] and storage.names("blobs") == []
    for content in (b"1", b"1"):
        folder = storage.here / "scratch" / "made"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(content)
        storage.add(folder, "blobs/one")
        assert not folder.exists()
    assert (storage.local("blobs/one") / "weights").read_bytes() == b"1"
    assert not storage.local("blobs/two").exists()
    storage.remove("blobs/one")
    assert not storage.local("blobs/one").exists()


def test_a_copy_is_made_on_another_machine_and_anew_when_it_is_not_trusted(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(s3)
    folder = store.scratch()
    (folder / "spec.json").write_text("{}")
    place = store.add_artifact(folder, ARTIFACT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    copy = Store(s3).artifact(ARTIFACT)
    assert copy != place and (copy / "spec.json").read_text() == "{}"
    (copy / "spec.json").write_text("damaged here")
    with (copy / "spec.json").open() as being_read:
        assert (Store(s3).artifact(ARTIFACT, fresh=True) / "spec.json").read_text() == "{}"
        assert being_read.read() == "damaged here", "whoever reads the old copy reads it to its end"


def test_the_copy_of_what_the_bucket_has_lost_is_kept_and_the_loss_found(
    s3: str, server: dict[str, str], tmp_path: Path
) -> None:
    store = Store(s3)
    folder = store.scratch()
    saved = artifact.save(fresh(small_resnet(base_width=4), 0), folder)
    copy = store.add_artifact(folder, saved.digest)
    store.publish(manifest_of(artifact=saved.digest, digest=saved.weights_digest, inputs=[]), lease_of(store))
    assert not [finding for finding in check(store, full=True) if finding.severity == "damage"]
    assert not list((store.root / "scratch").iterdir())
    there = client(server["AWS_ENDPOINT_URL"])
    prefix = store.artifact_location(saved.digest).removeprefix(f"s3://{BUCKET}/")
    there.put_object(Bucket=BUCKET, Key=f"{prefix}/weights.safetensors", Body=b"damaged")
    (finding,) = (found for found in check(store, full=True) if found.severity == "damage")
    assert finding.what.startswith(f"{finding.path}/weights.safetensors: ")
    for name, what in (("weights.safetensors", "weights.safetensors missing"), ("spec.json", "is missing")):
        there.delete_object(Bucket=BUCKET, Key=f"{prefix}/{name}")
        for full in (False, True):
            (finding,) = (found for found in check(store, full) if found.severity == "damage")
            assert finding.path == store.artifact_location(saved.digest) and what in finding.what
    assert store.artifact(saved.digest, fresh=True) == copy
    assert artifact.load(copy).spec == small_resnet(base_width=4), "the last one there is"


def append(storage: Storage, number: int) -> None:
    for line in range(20):
        storage.append("journal", b"%d %d\n" % (number, line), sync=False)


def test_of_lines_appended_by_several_processes_none_is_lost(storage: Storage) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append, args=(storage, number)) for number in range(2)]
    for process in processes:
        process.start()
    append(storage, 2)
    for process in processes:
        process.join()
    lines = [tuple(map(int, line.split())) for line in storage.read("journal").splitlines()]
    assert sorted(lines) == [(number, line) for number in range(3) for line in range(20)]
    for number in range(3):
        assert [line for who, line in lines if who == number] == list(range(20))


def test_a_journal_removed_in_between_begins_anew(storage: Storage) -> None:
    storage.append("journal", b"a\n")
    open_storage(storage.location()).remove("journal")
    storage.append("journal", b"b\n")
    assert storage.read("journal") in (b"b\n", b"a\nb\n")


def test_leases_and_fencing_hold_on_a_bucket(s3: str) -> None:
    store = Store(s3)
    folder = store.scratch()
    (folder / "spec.json").write_text("{}")
    store.add_artifact(folder, ARTIFACT)
    old = try_acquire(store.storage, KEY)
    assert old is not None and try_acquire(store.storage, KEY) is None
    new = try_acquire(store.storage, KEY, dead=old.generation)
    assert new is not None and new.is_current() and not old.is_current()
    assert not old.renew() and new.renew()
    with pytest.raises(Fenced):
        store.publish(manifest_of(), pickle.loads(pickle.dumps(old)))
    assert store.manifest(KEY) is None
    store.publish(manifest_of(), new)
    new.release()
    assert store.manifest(KEY) == manifest_of() and store.keys() == [KEY]
    assert store.find(store.artifact_location(ARTIFACT)).key == KEY
    store.drop([KEY])
    assert store.keys() == [] and not store.artifact(ARTIFACT).exists()


def count(storage: Storage, folder: Path) -> None:
    number = folder / "number"
    for _ in range(5):
        with held(storage, "counting"):
            number.write_text(str(int(number.read_text()) + 1))


def test_of_those_who_want_a_name_one_at_a_time_holds_it(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=count, args=(storage, tmp_path)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "number").read_text() == "10"
    (key,) = storage.names("leases")
    assert len(storage.names(f"leases/{key}")) <= 2, "old ones go"


MISTAKES = {
    "no bucket": ("s3://nowhere/x", {}),
    "no server": (PREFIX, {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}),
    "no such thing": ("what://bucket/x", {}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_address_that_leads_nowhere_is_a_users_mistake(
    mistake: str, s3: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    url, environment = MISTAKES[mistake]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    object_storage._connect.cache_clear()
    for command in (["store", "check"], ["run", "tests/integration/small.yaml"], ["report"]):
        assert main([*command, "--store", url]) == 2
        out, err = capfd.readouterr()
        assert out == "" and f"store {url}: cannot be used" in err and len(err.splitlines()) <= 3
    object_storage._connect.cache_clear()


def test_a_server_that_has_gone_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(tmp_path) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        object_storage._connect.cache_clear()
        storage = open_storage("s3://bucket/gone")
        storage.replace("a", b"1")
        folder = storage.here / "scratch" / "made"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"1")
        storage.add(folder, "blobs/one")
    monkeypatch.setattr(storage, "_client", object_storage._client("s3://bucket/gone", patient=False))
    for ask in (
        lambda: storage.read("a"),
        lambda: storage.replace("a", b"2"),
        storage.names,
        lambda: storage.local("blobs/one", fresh=True),
    ):
        with pytest.raises(Unreachable, match=r"(?s)s3://bucket/gone.*type the same command again"):
            ask()
    assert (storage.local("blobs/one") / "weights").read_bytes() == b"1", "the copy is kept"
    assert not list((storage.here / "scratch").iterdir())
    object_storage._connect.cache_clear()


def test_without_a_store_there_is_none(s3: str) -> None:
    with pytest.raises(UserError, match="there is none"):
        Store.existing(s3)
    Store(s3)
    assert Store.existing(s3).keys() == []
