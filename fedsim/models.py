"""The models clients train. Each is a plain `nn.Sequential` that adapts to the data set's images and classes.

A model maps images [B, C, H, W] float32 to logits [B, num_classes]. To add one, write a function with the signature
below and give it a line in `MODELS`; from Python, pass your own factory to `fedsim.run(model=...)`. Torch is imported
in the functions, so that the table can be read without.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from fedsim.errors import ConfigError
from fedsim.seeding import torch_seed

if TYPE_CHECKING:
    from torch import nn

ImageShape = tuple[int, int, int]  # C, H, W
ModelFactory: TypeAlias = "Callable[[ImageShape, int], nn.Module]"


def mlp(input_shape: ImageShape, num_classes: int) -> nn.Module:
    """One hidden layer of 64: the model of the program fedsim began as (784-64-10, 50,890 parameters on MNIST)."""
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), 64), nn.ReLU(), nn.Linear(64, num_classes))


def two_nn(input_shape: ImageShape, num_classes: int) -> nn.Module:
    """The 2NN of McMahan et al. 2017: two hidden layers of 200 (199,210 parameters on MNIST)."""
    from torch import nn

    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(prod(input_shape), 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, num_classes),
    )


def cnn(input_shape: ImageShape, num_classes: int) -> nn.Module:
    """The CNN of McMahan et al. 2017 (1,663,370 parameters on MNIST).

    Two 5x5 convolutions (32, 64 channels), each followed by ReLU and 2x2 max pooling, then a layer of 512. The paper
    does not give the padding: only 'same' fits its number of parameters.
    """
    from torch import nn

    channels, height, width = input_shape
    if height < 4 or width < 4:
        raise ConfigError(f"model.name = 'cnn' needs images of at least 4x4 pixels, not {height}x{width}; try mlp")
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 512),
        nn.ReLU(),
        nn.Linear(512, num_classes),
    )


def logistic(input_shape: ImageShape, num_classes: int) -> nn.Module:
    """Multinomial logistic regression: one linear layer (7,850 parameters on MNIST)."""
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), num_classes))


def build(factory: Callable[..., nn.Module], input_shape: ImageShape, num_classes: int, seed: int) -> nn.Module:
    """Makes a model with PyTorch's default initialisation, drawn from the run's own stream.

    Args:
        factory: an entry of `MODELS`, or a user's own: called with (input_shape, num_classes) if it has parameters of
            these names, or cannot do without any; else with nothing.
        input_shape: C, H, W of an image.
        num_classes: length of the logits.
        seed: the run's seed.

    Raises:
        ConfigError: the factory does not return an `nn.Module`.

    Determinism: the same weights for the same seed; torch's global generator is left as it was.
    """
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch_seed("init", seed))
        module = factory(input_shape, num_classes) if _takes_arguments(factory) else factory()
    if not isinstance(module, nn.Module):
        raise ConfigError(f"the model factory must return a torch.nn.Module, not {type(module).__name__}")
    return module


def _takes_arguments(factory: Callable[..., nn.Module]) -> bool:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some builtins have none
        return False
    if {"input_shape", "num_classes"} <= signature.parameters.keys():
        return True
    try:
        signature.bind()
    except TypeError:
        return True
    return False


MODELS: dict[str, ModelFactory] = {"mlp": mlp, "2nn": two_nn, "cnn": cnn, "logistic": logistic}
