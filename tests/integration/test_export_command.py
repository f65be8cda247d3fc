"""`pbkd export` as a user types it: a pruned student leaves the store, and MLflow answers with it."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pbkd import artifact
from pbkd.data import DataSettings, open_data
from pbkd.export import to_pixels
from pipelines.cli import main
from pipelines.recipe import SMOKE_SAMPLES
from tests.integration.pbkd_process import ROOT


@pytest.fixture(scope="module")
def store(small_demo: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the networks of the demo, which ends in a pruned student."""
    return Path(shutil.copytree(small_demo["store"], tmp_path_factory.mktemp("store") / "runs"))


@pytest.fixture
def stages(store: Path) -> dict[str, dict[str, Any]]:
    """What the journal says of the finished stages, by name."""
    (journal,) = store.glob("pipelines/*/journal.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    return {record["name"]: record for record in records if record["type"] == "finished"}


def pbkd(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_student_leaves_with_its_parity_and_its_card(
    store: Path, stages: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, out, limit = stages["recovered"]["key"], tmp_path / "out", SMOKE_SAMPLES["digits"]
    code, printed, _ = pbkd(capsys, "export", key[:12], "--store", store, "--out", out, "--json")
    facts = json.loads(printed)
    kept = json.loads((out / "export.json").read_text())  # without places of this machine
    assert code == 0 and facts == kept | {name: facts[name] for name in ("path", "card", "serve")}
    assert facts["path"] == str(out / "model.onnx") and facts["bytes"] == (out / "model.onnx").stat().st_size
    assert facts["compared_on"] == "test images" and facts["images"] == limit
    assert facts["max_abs_diff"] <= 1e-4 and facts["agreement"] == 100
    assert facts["latency_ms"].keys() == {"file", "pytorch"}

    # With nothing but what the file and export.json say, the accuracy is that of the manifest.
    manifest = json.loads((store / "manifests" / f"{key}.json").read_text())
    data = open_data(DataSettings(name="digits", limit=limit))
    split = data.reader("test", limit, seed=0)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    interface = json.loads(session.get_modelmeta().custom_metadata_map["pbkd.interface"])
    assert interface["preprocessing"] == data.settings.preprocessing().model_dump(mode="json")
    assert interface["input_shape"] == [1, 8, 8] and interface["classes"] == list("0123456789")
    assert manifest["interface"] == {key: interface[key] for key in ("preprocessing", "classes")}
    images, labels = (tensor.numpy() for tensor in next(iter(split)))
    logits = np.concatenate([session.run(None, {interface["input"]: image[None]})[0] for image in images])
    assert 100 * np.mean(logits.argmax(1) == labels) == pytest.approx(manifest["metrics"]["test_accuracy"])

    card = (out / "README.md").read_text()
    assert f"| test accuracy, % | {manifest['metrics']['test_accuracy']:.2f} |" in card
    assert manifest["data_digest"] in card and "CC BY 4.0" in card
    rows = [
        line for line in card.splitlines() if line.startswith(("| recovered | distill", "| teacher | train"))
    ]
    assert len(rows) == 2, "from the student back to the teacher"

    program = card.split("```python\n")[1].split("```")[0] + "\nprint(label)"
    pixels = to_pixels(torch.from_numpy(images[:1]), data.settings.preprocessing()).numpy()
    Image.fromarray(pixels[0, ..., 0]).save(out / "image.png")
    ran = subprocess.run([sys.executable, "-c", program], cwd=out, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(logits[0].argmax()), "the card's own code runs the file on an image"

    # Another time, by the artifact's folder and in another format: the folder is replaced.
    artifact = store / "artifacts" / manifest["artifact"]
    options = ("--format", "safetensors", "--fp16", "--licence", "mine")
    code, printed, _ = pbkd(capsys, "export", artifact, "--store", store, "--out", out, *options)
    assert code == 0 and f"100.00 % of {limit} test images" in printed
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "export.json", "model.safetensors"]
    assert "Licence: mine." in (out / "README.md").read_text()
    assert load_file(out / "model.safetensors")["classifier.fc1.weight"].dtype.itemsize == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    # The pipeline's report lists what lies there now.
    code, page, _ = pbkd(capsys, "report", "--store", store)
    html = Path(page.strip()).read_text()
    assert code == 0 and html.count("model.safetensors") == 1
    assert '<td class="text">safetensors, fp16</td>' in html


@pytest.fixture
def server(store: Path, stages: dict[str, Any], tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """`mlflow models serve` on an exported student: its folder and its address."""
    folder = tmp_path / "served"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key = stages["recovered"]["key"]
    assert main(["export", key, "--store", str(store), "--dynamic-batch", "--out", str(folder)]) == 0
    programs = Path(sys.executable).parent
    process = subprocess.Popen(
        [programs / "mlflow", "models", "serve", "-m", folder, "--env-manager", "local", "-p", str(port)],
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "Uvicorn running on" in line:
            break
    else:
        pytest.fail("the server ended: " + "".join(said))
    yield folder, f"http://127.0.0.1:{port}/invocations"
    os.killpg(process.pid, 15)
    process.communicate(timeout=60)


def as_file(image: np.ndarray) -> str:
    """A PNG of it, in base64."""
    stream = BytesIO()
    Image.fromarray(image[..., 0].astype(np.uint8)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def ask(address: str, images: object) -> tuple[int, dict[str, Any]]:
    body = json.dumps({"inputs": {"images": images}}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)["predictions"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_mlflow_serves_it_pixels_and_files_and_refuses_what_it_cannot_interpret(
    server: tuple[Path, str], store: Path
) -> None:
    folder, address = server
    pixels = np.asarray(json.loads((folder / "serving_input_example.json").read_bytes())["inputs"]["images"])
    assert pixels.shape == (1, 8, 8, 1) and len(np.unique(pixels)) > 4, "a real digit"
    several = np.concatenate([pixels, pixels[:, ::-1]])
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    images = ((several / 255 - 0.3053) / 0.3760).transpose(0, 3, 1, 2).astype(np.float32)
    expected = session.run(None, {"images": images})[0]
    for asked in (several.tolist(), [as_file(image) for image in several]):
        code, answer = ask(address, asked)
        np.testing.assert_allclose(answer["logits"], expected, atol=1e-5)
        assert code == 200 and answer["class"] == [str(label) for label in expected.argmax(1)]
    for wrong in ((pixels / 255), pixels - 128, pixels + 128, images, pixels[:, :6], np.zeros((0, 8, 8, 1))):
        code, answer = ask(address, wrong.tolist())
        assert code == 400 and "whole numbers from 0 to 255" in answer["message"]
    assert ask(address, ["no file"])[0] == ask(address, [None])[0] == 400
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]  # the server's
    written = b"".join(path.read_bytes() for path in files)
    assert not any(str(place).encode() in written for place in (store, folder, ROOT)), (
        "no path of this machine"
    )


def test_the_registry_serves_the_champion_by_its_name(
    small_demo: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Path(small_demo["store"]) / "mlflow" / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    (student,) = (row for row in small_demo["stages"] if row["name"] == small_demo["student"])
    network = artifact.load(Path(student["artifact"]))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    answer = mlflow.pyfunc.load_model("models:/digits@champion").predict({"images": pixels})
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.3053) / 0.3760
    with torch.inference_mode():
        np.testing.assert_allclose(answer["logits"], network(images).numpy(), atol=1e-5)


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_file_that_takes_pixels(
    form: str, store: Path, stages: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, out = stages["recovered"]["key"], tmp_path / "out"
    words = [
        "export",
        key,
        "--store",
        store,
        "--out",
        out,
        "--format",
        form,
        "--with-preprocessing",
        "--json",
    ]
    code, printed, _ = pbkd(capsys, *words)
    facts = json.loads(printed)
    assert code == 0 and facts["agreement"] == 100 and facts["max_abs_diff"] < 1e-4
    assert facts["input_type"] == "uint8" and facts["input_shape"] == [8, 8, 1]
    if form == "onnx":
        session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
        (takes,) = session.get_inputs()
        assert (takes.type, takes.shape) == ("tensor(uint8)", [1, 8, 8, 1])
        pixels = json.loads((out / "serving_input_example.json").read_text())["inputs"]["images"]
        answer = mlflow.pyfunc.load_model(str(out)).predict({"images": np.array(pixels, np.uint8)})
        logits = session.run(None, {takes.name: np.array(pixels, np.uint8)})[0]
        np.testing.assert_allclose(answer["logits"], logits, atol=1e-6)


MISTAKES = {
    ("0123456789ab",): "'0123456789ab' is not in the store",
    ("KEY", "seed=1"): "override 'seed=1': only the data can be elsewhere",
    ("KEY", "data.rot=x"): "unknown key 'data.rot'; did you mean 'root'?",
    (
        "KEY",
        "data.name=folder",
        "data.root=nowhere",
        "data.num_classes=10",
    ): "or compare on noise: --without-data",
    ("KEY", "data.name=cifar10", "data.root=nowhere"): "nowhere/cifar-10-batches-py/data_batch_1 is missing",
    ("KEY", "--with-preprocessing", "--format", "safetensors"): "safetensors has weights alone",
    ("KEY", "--out", "."): "is there, and no export of pbkd's",
    ("KEY", "--format", "onx"): "not one of 'onnx', 'pt2', 'safetensors'",
}


@pytest.mark.parametrize("typed", MISTAKES, ids=" ".join)
def test_mistakes_are_named_and_leave_nothing(
    typed: tuple[str, ...],
    store: Path,
    stages: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [stages["recovered"]["key"] if word == "KEY" else word for word in typed]
    code, out, err = pbkd(capsys, "export", *arguments, "--store", store)
    assert code == 2 and out == "" and MISTAKES[typed] in err and len(err.splitlines()) <= 3, err
    assert list(tmp_path.iterdir()) == []


def test_other_data_are_noticed_and_noise_is_owned_up_to(
    store: Path, stages: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data set has changed since: it is not what the network was measured on."""
    key = stages["pruned"]["key"]
    path = store / "manifests" / f"{key}.json"
    content = path.read_text()
    manifest = json.loads(content)
    try:
        path.write_text(json.dumps(manifest | {"data_digest": "ab" * 32}))
        code, _, err = pbkd(capsys, "export", key, "--store", store, "--out", tmp_path / "out")
    finally:
        path.write_text(content)
    assert code == 2 and "these are other data" in err and "--without-data" in err

    options = ("--format", "pt2", "--without-data", "--out", tmp_path / "out")
    code, out, _ = pbkd(capsys, "export", key, "--store", store, *options)
    assert code == 0 and "images of noise" in out
    assert "images of noise" in (tmp_path / "out" / "README.md").read_text()
