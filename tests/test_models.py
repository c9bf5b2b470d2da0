import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsim.errors import ConfigError
from fedsim.models import MODELS, build
from fedsim.seeding import torch_seed

MNIST = (1, 28, 28)
NUM_PARAMETERS = {"mlp": 50_890, "2nn": 199_210, "cnn": 1_663_370, "logistic": 7_850}  # of the contract, on MNIST


def state(module: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_of_parameters_on_mnist(name):
    module = build(MODELS[name], MNIST, 10, seed=0)
    assert sum(p.numel() for p in module.parameters()) == NUM_PARAMETERS[name]
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())


def test_the_contracts_models_are_there():
    assert list(MODELS) == list(NUM_PARAMETERS)


@pytest.mark.parametrize("name", MODELS)
@settings(derandomize=True, deadline=None, max_examples=8)
@given(shape=st.tuples(st.integers(1, 4), st.integers(4, 12), st.integers(4, 12)), classes=st.integers(2, 20))
def test_models_adapt_to_images_and_classes(name, shape, classes):
    module = build(MODELS[name], shape, classes, seed=0).eval()
    with torch.inference_mode():
        for batch in (1, 3):
            logits = module(torch.zeros(batch, *shape))
            assert logits.shape == (batch, classes)
            assert logits.dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_models_adapt_to_cifar_100(name):
    module = build(MODELS[name], (3, 32, 32), 100, seed=0).eval()
    with torch.inference_mode():
        assert module(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize("name", MODELS)
def test_each_example_has_its_own_answer(name):
    """Nothing in a model mixes the examples of a batch."""
    module = build(MODELS[name], (1, 8, 8), 5, seed=0).eval()
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = module(images)
        alone = torch.cat([module(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-6), "an answer depends on its image"


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("logistic", ["Flatten", "Linear"]),
        ("mlp", ["Flatten", "Linear", "ReLU", "Linear"]),
        ("2nn", ["Flatten", "Linear", "ReLU", "Linear", "ReLU", "Linear"]),
        ("cnn", ["Conv2d", "ReLU", "MaxPool2d"] * 2 + ["Flatten", "Linear", "ReLU", "Linear"]),
    ],
)
def test_the_architectures(name, kinds):
    module = build(MODELS[name], MNIST, 10, seed=0)
    assert [type(layer).__name__ for layer in module] == kinds


# ---------------------------------------------------------------- initialisation


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_gives_a_model(name):
    assert state(build(MODELS[name], MNIST, 10, 5)) == state(build(MODELS[name], MNIST, 10, 5))
    assert state(build(MODELS[name], MNIST, 10, 5)) != state(build(MODELS[name], MNIST, 10, 6))


@pytest.mark.parametrize("name", MODELS)
def test_the_initialisation_is_pytorchs_own(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed("init", 5))
        plain = MODELS[name](MNIST, 10)
    assert state(build(MODELS[name], MNIST, 10, 5)) == state(plain)


def test_the_global_generator_is_neither_read_nor_moved():
    kept = torch.get_rng_state()
    try:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = state(build(MODELS["mlp"], MNIST, 10, 5))
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(7)
        assert state(build(MODELS["mlp"], MNIST, 10, 5)) == first
    finally:
        torch.set_rng_state(kept)


def test_the_global_generator_is_put_back_after_an_error():
    before = torch.get_rng_state()

    def broken() -> nn.Module:
        torch.rand(3)
        raise RuntimeError("a bug of the user")

    with pytest.raises(RuntimeError, match="a bug of the user"):
        build(broken, MNIST, 10, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_pythons_and_numpys_generators_are_left_alone():
    before = random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    build(MODELS["cnn"], MNIST, 10, 0)
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before  # noqa: NPY002


# ---------------------------------------------------------------- factories


class NoArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)


class Needs(nn.Module):
    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.arguments = input_shape, num_classes
        self.layer = nn.Linear(3, 2)


def function(input_shape: tuple[int, int, int], num_classes: int, width: int = 3) -> nn.Module:
    return Needs(input_shape, num_classes)


class Factory:
    """A factory that is an object, with settings of its own."""

    def __call__(self, input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        return Needs(input_shape, num_classes)


@pytest.mark.parametrize(
    "factory",
    [Needs, Factory(), function, lambda shape, classes: Needs(shape, classes)],
    ids=["class", "object", "function with an option", "lambda"],
)
def test_a_factory_that_takes_something_gets_shape_and_classes(factory):
    assert build(factory, (3, 8, 9), 7, seed=0).arguments == ((3, 8, 9), 7)


@pytest.mark.parametrize("factory", [NoArguments, lambda: NoArguments(), lambda: nn.Linear(3, 2)])
def test_a_factory_that_takes_nothing_gets_nothing(factory):
    module = build(factory, (3, 8, 9), 7, seed=0)
    assert sum(p.numel() for p in module.parameters()) == 8


@pytest.mark.parametrize(
    "made", [None, {"weight": 1}, nn.Linear, torch.zeros(3)], ids=["None", "dict", "class", "tensor"]
)
def test_what_is_no_module_is_refused(made):
    with pytest.raises(ConfigError, match=rf"must return a torch\.nn\.Module, not {type(made).__name__}"):
        build(lambda: made, MNIST, 10, 0)


@pytest.mark.parametrize("shape", [(1, 3, 3), (1, 3, 28), (1, 28, 3)])
def test_images_too_small_for_the_cnn_are_refused(shape):
    with pytest.raises(ConfigError, match=rf"'cnn' needs images of at least 4x4 pixels, not {shape[1]}x{shape[2]}"):
        build(MODELS["cnn"], shape, 10, 0)
    assert build(MODELS["cnn"], (1, 4, 4), 10, 0)(torch.zeros(1, 1, 4, 4)).shape == (1, 10)


def test_a_factory_with_defaults_for_shape_and_classes_is_given_them():

    def make(input_shape=(1, 28, 28), num_classes=10):
        return nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], num_classes)

    assert build(make, (3, 32, 32), 100, 0).out_features == 100
