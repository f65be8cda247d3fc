"""Where a student block starts: nearer to its teacher, the more it takes from it."""

import copy

import pytest
import torch
from torch import Tensor

from pbkd.measure import evaluate
from pbkd.networks import BlockNetwork, NetworkSpec, build_block
from pbkd.students import (
    StudentSettings,
    initialize_inherit,
    initialize_kaiming,
    initialize_least_squares,
    student_block,
)
from tests.unit.small_networks import digits, small_bottleneck, small_resnet, small_vgg, trained

pytestmark = pytest.mark.slow

SPECS = {
    "vgg": (small_vgg(norm=False), 30, 0.1),
    "vgg_bn": (small_vgg(norm=True), 10, 0.1),
    "basic": (small_resnet("resnet20"), 5, 0.1),
    "bottleneck": (small_bottleneck(), 6, 0.1),
}


@pytest.fixture(scope="module", params=SPECS)
def teacher(request: pytest.FixtureRequest) -> BlockNetwork:
    spec, epochs, lr = SPECS[request.param]
    return trained(spec, epochs, lr)


@pytest.fixture(scope="module")
def images() -> Tensor:
    reader = digits().reader("train", 256, 3, shuffle=True)
    return next(iter(reader))[0]


@torch.no_grad()
def student_of(
    network: BlockNetwork,
    index: int,
    init: str,
    images: Tensor,
    teacher: BlockNetwork,
    settings: StudentSettings,
) -> float:
    """Put a student block into `network`; the relative error of its feature on other images."""
    spec = student_block(teacher.spec.blocks[index], settings)
    student, given = build_block(spec), teacher.blocks[index]
    assert isinstance(given, torch.nn.Module)
    if init == "kaiming":
        initialize_kaiming(student, 1)
    elif init == "inherit":
        initialize_inherit(student, given, 1)
    else:
        inputs = (part.prefix(index)(images[:192]) for part in (network, teacher))
        initialize_least_squares(student, given, *inputs, seed=1)
    network.replace_block(index, spec, student.eval())
    unseen = images[192:]
    target = teacher.prefix(index + 1)[:-1](unseen)
    return float((network.prefix(index + 1)[:-1](unseen) - target).square().sum() / target.square().sum())


@pytest.mark.parametrize("projection_norm", [False, True])
def test_closed_form_start_is_much_nearer_than_inherited_filters(
    teacher: BlockNetwork, images: Tensor, projection_norm: bool
) -> None:
    settings = StudentSettings(projection_norm=projection_norm)
    errors = {}
    for init in ("kaiming", "inherit", "least_squares"):
        network = copy.deepcopy(teacher)
        errors[init] = [
            student_of(network, index, init, images, teacher, settings)
            for index in range(len(teacher.blocks))
        ]
    for solved, inherited, random in zip(
        *(errors[init] for init in ("least_squares", "inherit", "kaiming")), strict=True
    ):
        assert solved < 0.75 * inherited
        assert solved < 0.75 * random


def test_closed_form_student_needs_no_training_to_be_useful(teacher: BlockNetwork, images: Tensor) -> None:
    network = copy.deepcopy(teacher)
    for index in range(len(teacher.blocks)):
        student_of(network, index, "least_squares", images, teacher, StudentSettings())
    before, after = (evaluate(part, digits().reader("test", 500)).top1 for part in (teacher, network))
    assert before > 80
    assert after - 10 > (before - 10) / 2, f"{before} -> {after}, where guessing gives 10"


def test_full_width_closed_form_is_the_teacher(teacher: BlockNetwork, images: Tensor) -> None:
    network = copy.deepcopy(teacher)
    error = student_of(network, 0, "least_squares", images, teacher, StudentSettings(width=1.0))
    assert error < 0.02


def test_full_width_inheritance_is_the_teacher_exactly(teacher: BlockNetwork, images: Tensor) -> None:
    for index in range(len(teacher.blocks)):
        error = student_of(
            copy.deepcopy(teacher), index, "inherit", images, teacher, StudentSettings(width=1.0)
        )
        assert error < 1e-9


@pytest.mark.parametrize("init", ["kaiming", "inherit", "least_squares"])
def test_starts_are_functions_of_the_seed_and_leave_the_teacher_alone(init: str, images: Tensor) -> None:
    given = trained(small_resnet(base_width=4), 1)
    state = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    students = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        network = copy.deepcopy(given)
        student_of(network, 1, init, images, given, StudentSettings())
        students.append(network.blocks[1].state_dict())
    assert all(torch.equal(tensor, students[1][name]) for name, tensor in students[0].items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in given.state_dict().items())


def test_shortcut_of_the_teacher_is_kept() -> None:
    spec: NetworkSpec = small_resnet(shortcut="B")
    given = trained(spec, 1)
    student = build_block(student_block(spec.blocks[1], StudentSettings()))
    initialize_inherit(student, given.blocks[1], 0)
    theirs = given.blocks[1].state_dict()
    shortcuts = {name: tensor for name, tensor in student.state_dict().items() if "shortcut" in name}
    assert shortcuts
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in shortcuts.items())
