"""Checkpoints: everything comes back, and a damaged one is never believed."""

import io
import logging
import pickle
import threading
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import nn

from pbkd.engine import Checkpoints, LocalSession, OptimizerSettings, State
from pbkd.engine.state import apply, capture
from pbkd.storage import Folder


def state(step: int) -> State:
    tensors = {"module/w": torch.full((3, 2), float(step)), "optimizer/0/step": torch.tensor(step)}
    return State(step, tensors, {"scaler": {}, "counted": step}, [{"step": step, "train_loss": 0.1 + 0.2}])


def steps(folder: Path) -> list[str]:
    """The checkpoints in a folder, without their digests."""
    return sorted(path.name.rpartition("-")[0] for path in folder.iterdir())


def file_of(folder: Path, step: int) -> Path:
    (found,) = folder.glob(f"step-{step:09d}-*")
    return found


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Folder(tmp_path / "new" / "folder"))
    assert checkpoints.restore() is None
    checkpoints.save(state(7))
    found = checkpoints.restore()
    assert found is not None
    assert (found.step, found.numbers, found.history) == (7, state(7).numbers, state(7).history)
    assert torch.equal(found.tensors["module/w"], state(7).tensors["module/w"])
    assert found.tensors["optimizer/0/step"].dtype == torch.int64


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Folder(tmp_path))
    for step in (1, 2, 9, 10):
        checkpoints.save(state(step))
    again = state(10)
    again.numbers["counted"] = 11
    checkpoints.save(again)
    assert steps(tmp_path) == ["step-000000009", "step-000000010"]
    found = checkpoints.restore()
    assert found is not None and found.numbers["counted"] == 11


@pytest.mark.parametrize("damage", ["cut", "flipped header", "flipped tensor", "empty", "another's"])
def test_a_damaged_newest_is_passed_over_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(Folder(tmp_path))
    checkpoints.save(state(1))
    checkpoints.save(state(2))
    file = file_of(tmp_path, 2)
    content = bytearray(file.read_bytes())
    match damage:
        case "cut":
            file.write_bytes(content[:-3])
        case "flipped header":
            content[content.index(b"train_loss")] ^= 1
            file.write_bytes(content)
        case "flipped tensor":
            content[-1] ^= 1
            file.write_bytes(content)
        case "empty":
            file.write_bytes(b"")
        case "another's":
            file.write_bytes(file_of(tmp_path, 1).read_bytes())
    with caplog.at_level(logging.WARNING):
        found = checkpoints.restore()
    assert found is not None
    assert found.step == 1
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "step-000000002 is damaged" in warning and "goes on from step 1" in warning
    checkpoints.save(state(1))
    checkpoints.save(state(2))
    found = checkpoints.restore()
    assert found is not None and found.step == 2


def test_a_sound_one_is_not_given_up_for_a_later_one_that_is_damaged(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Folder(tmp_path))
    for step in (1, 2, 9):
        checkpoints.save(state(step))
    file_of(tmp_path, 9).write_text("")
    checkpoints.save(state(3))
    assert steps(tmp_path) == ["step-000000002", "step-000000003"]


def test_one_that_cannot_be_reached_is_not_taken_for_damaged(tmp_path: Path) -> None:
    class Broken(Folder):
        def read(self, name: str, start: int = 0) -> bytes:
            raise ConnectionError("the network is down")

    Checkpoints(Folder(tmp_path)).save(state(1))
    with pytest.raises(ConnectionError):
        Checkpoints(Broken(tmp_path)).restore()


def test_with_all_damaged_it_begins_again_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(Folder(tmp_path))
    for step in (1, 2):
        checkpoints.save(state(step))
        file_of(tmp_path, step).write_text("[]")
    with caplog.at_level(logging.WARNING):
        assert checkpoints.restore() is None
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "step-000000001 is damaged" in warning and "begins again" in warning


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> object:
        return Path.touch, (self.sprung,)


def test_a_pickle_planted_as_a_checkpoint_is_not_unpickled_though_its_digest_fits(tmp_path: Path) -> None:
    checkpoints, sprung = Checkpoints(Folder(tmp_path)), tmp_path / "sprung"
    archive = io.BytesIO()
    torch.save({"w": Trap(sprung)}, archive)
    for step, planted in enumerate((pickle.dumps(Trap(sprung)), archive.getvalue())):
        (tmp_path / f"step-{step:09d}-{sha256(planted).hexdigest()}").write_bytes(planted)
    assert checkpoints.restore() is None
    assert not sprung.exists()


def test_a_crash_while_writing_leaves_the_one_before_and_is_cleaned_up(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Folder(tmp_path))
    checkpoints.save(state(1))
    (tmp_path / ".step-000000002-00.0123").write_bytes(b"half")
    found = checkpoints.restore()
    assert found is not None
    assert found.step == 1
    LocalSession(tmp_path).restore()
    assert steps(tmp_path) == ["step-000000001"]


def test_what_cannot_be_written_is_raised_at_the_latest_by_commit(tmp_path: Path) -> None:
    session = LocalSession(tmp_path / "work")
    session.save(state(1))
    session.commit()
    (tmp_path / "work").rename(tmp_path / "before")
    (tmp_path / "work").write_text("in the way of the folder")
    session.save(state(2))
    with pytest.raises((FileExistsError, NotADirectoryError)):
        session.commit()
    session.commit()
    found = Checkpoints(Folder(tmp_path / "before")).restore()
    assert found is not None and found.step == 1


def test_a_checkpoint_is_due_after_half_its_steps_or_its_seconds(tmp_path: Path) -> None:
    by_steps = LocalSession(tmp_path, checkpoint_steps=6)
    assert [by_steps.due(step) for step in range(4)] == [False, False, False, True]
    by_steps.save(state(3))
    by_steps.commit()
    assert [by_steps.due(step) for step in (3, 5, 6)] == [False, False, True]
    resumed = LocalSession(tmp_path, checkpoint_steps=6)
    resumed.restore()
    assert [resumed.due(step) for step in (3, 5, 6)] == [False, False, True]
    assert LocalSession(tmp_path, checkpoint_seconds=0.0).due(0)
    assert not LocalSession(checkpoint_seconds=0.0).due(0), "nowhere to keep it"


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_captured_state_is_independent_and_complete(name: str) -> None:
    def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            module(torch.ones(2, 3, 4, 4)).square().sum().backward()
            optimizer.step()

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
        settings = OptimizerSettings.model_validate({"name": name, "lr": 0.01})
        return module, settings.build(module)

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    module, optimizer = build()
    train(module, optimizer, 3)
    kept = capture(3, module, optimizer, scaler, [])
    train(module, optimizer, 2)
    other, its_optimizer = build()
    apply(kept, other, its_optimizer, scaler)
    train(other, its_optimizer, 2)
    assert all(torch.equal(tensor, module.state_dict()[n]) for n, tensor in other.state_dict().items())
    restored = [
        value for entry in its_optimizer.state.values() for value in entry.values() if value.dim() == 4
    ]
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in restored)


class Slow(Folder):
    """Writes only when it is let."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.let = threading.Semaphore(0)

    def replace(self, name: str, content: bytes, sync: bool = True) -> None:
        self.let.acquire()
        super().replace(name, content, sync)


@pytest.mark.parametrize("interval", [1, 2, 3, 8])
def test_no_more_steps_than_the_interval_are_at_stake_however_slow_the_disk_is(
    interval: int, tmp_path: Path
) -> None:
    slow = Slow(tmp_path)
    session = LocalSession(slow, checkpoint_steps=interval)
    worst = saved = 0
    for step in range(1, 30):  # as the loop does: a step is taken, then what is due is saved
        found = Checkpoints(Folder(tmp_path)).restore()  # what a kill at this moment would leave
        worst = max(worst, step - (found.step if found else 0))
        if session.due(step):
            if saved or interval == 1:
                slow.let.release()  # each is written at the last moment: when the next is to be begun
            session.save(state(step))
            saved += 1
    slow.let.release()
    session.commit()
    assert 0 < worst <= interval
