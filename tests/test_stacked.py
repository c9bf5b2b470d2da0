"""The stacked engine against autograd, and a stack against each of its clients alone."""

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsim import models
from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.experiment import prepare
from fedsim.numerics import numerics
from fedsim.stacked import Stacked, engine, layers, obstacle, stack
from fedsim.stacked.engine import Piece, pieces
from fedsim.stacked.layers import LAYERS
from fedsim.stacked.lookahead import worthwhile_block
from fedsim.stacked.parameter import Parameter
from fedsim.stacked.patches import PatchedConv2d
from fedsim.training import Evaluation, Examples, Loop, Sgd, Trained, Work
from fedsim.weights import Layout, Weights

SHAPE, CLASSES = (2, 12, 10), 4
RNG = np.random.Generator(np.random.PCG64(5))
EXAMPLES = Examples(
    torch.from_numpy(RNG.integers(256, size=(300, *SHAPE), dtype=np.uint8)),
    torch.from_numpy(RNG.integers(CLASSES, size=300)),
)
PLAIN = Sgd(lr=0.1)
HEAVY = Sgd(lr=0.05, momentum=0.9, weight_decay=0.02)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with numerics(1):
        yield


# For each layer type a model that has it, with options that are not the defaults.
EXAMPLE_MODELS: dict[type[nn.Module], Callable[[], nn.Module]] = {
    nn.Linear: lambda: nn.Sequential(nn.Flatten(), nn.Linear(240, 7), nn.Linear(7, CLASSES, bias=False)),
    nn.Conv2d: lambda: nn.Sequential(
        nn.Conv2d(2, 6, (3, 5), stride=(2, 1), padding=(1, 2), groups=2),
        nn.Conv2d(6, 5, 3, dilation=(1, 2), bias=False),
        nn.Conv2d(5, 4, 3, padding="same"),
        nn.Conv2d(4, 3, 2, padding="valid"),
        nn.Flatten(),
        nn.Linear(45, CLASSES),
    ),
    nn.MaxPool2d: lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True), nn.Flatten(), nn.Linear(120, CLASSES)
    ),
    nn.AvgPool2d: lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.AvgPool2d((2, 3), stride=2, padding=(1, 0), count_include_pad=False),
        nn.Flatten(),
        nn.Linear(72, CLASSES),
    ),
    nn.Flatten: lambda: nn.Sequential(nn.Conv2d(2, 3, 5), nn.Flatten(), nn.Linear(144, CLASSES)),
    nn.Identity: lambda: nn.Sequential(nn.Identity(), nn.Flatten(), nn.Identity(), nn.Linear(240, CLASSES)),
    nn.ReLU: lambda: with_activation(nn.ReLU(inplace=True)),
    nn.Tanh: lambda: with_activation(nn.Tanh()),
    nn.Sigmoid: lambda: with_activation(nn.Sigmoid()),
    nn.GELU: lambda: with_activation(nn.GELU(approximate="tanh")),
}


def with_activation(activation: nn.Module) -> nn.Module:
    """Before, between and after trained layers, in nested parts."""
    inner = nn.Sequential(nn.Linear(240, 13), activation)
    return nn.Sequential(nn.Flatten(), nn.Tanh(), inner, nn.Linear(13, CLASSES), nn.GELU())


def made(factory: Callable[..., nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    return models.build(factory, SHAPE, CLASSES, seed=3).to(dtype)


def work(*sizes: int, epochs: int = 1) -> list[Work]:
    """A client for each size: its own examples, in another order each epoch."""
    rng = np.random.Generator(np.random.PCG64(1))
    shards = [rng.permutation(300)[:size] for size in sizes]
    return [Work([torch.from_numpy(rng.permutation(shard)) for _ in range(epochs)], 0) for shard in shards]


def stacked(module: nn.Module, sgd: Sgd, batch_size: int) -> Stacked:
    return Stacked(module, sgd, batch_size, CLASSES)


def start(module: nn.Module) -> Weights:
    return Layout.of(module).flatten(module)


def bits(trained: Trained) -> tuple[int, float, bytes]:
    return trained.num_steps, trained.train_loss, trained.weights.flat.numpy().tobytes()


# ---------------------------------------------------------------- against autograd


def test_there_is_a_model_for_each_layer_type():
    assert EXAMPLE_MODELS.keys() == LAYERS.keys()


@pytest.mark.parametrize("sgd", [PLAIN, Sgd(0.1, weight_decay=0.1), Sgd(0.05, momentum=0.5), HEAVY], ids=str)
@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_it_trains_as_autograd_does(kind, sgd):
    """In float64, over epochs with a short last batch, clients of unequal size: to 1e-9, as every step is the same."""
    module = made(EXAMPLE_MODELS[kind], torch.float64)
    assert obstacle(module, SHAPE, CLASSES) is None
    clients = work(23, 30, 8, epochs=2)
    ours = stacked(module, sgd, 10).train(start(module), EXAMPLES, clients)
    theirs = Loop(module, sgd, 10).train(start(module), EXAMPLES, clients)
    for a, b in zip(ours, theirs, strict=True):
        assert a.num_steps == b.num_steps
        assert a.train_loss == pytest.approx(b.train_loss, rel=1e-9)
        torch.testing.assert_close(a.weights.flat, b.weights.flat, rtol=1e-9, atol=1e-11)
        assert (a.weights.flat - start(module).flat).abs().max() > 1e-4, "it has learnt"


@pytest.mark.parametrize("sgd", [PLAIN, HEAVY], ids=["plain", "momentum and decay"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.Flatten], ids=lambda kind: kind.__name__)
def test_patched_convolutions_train_as_autograd_does(monkeypatch, kind, sgd):
    """What a GPU takes for stacks, here on the CPU."""
    made_so = []

    def patched(module, parameters):
        usual = layers.Conv2d(module, parameters)
        if module.groups > 1:
            return usual
        made_so.append(PatchedConv2d(module, parameters, layers._padding(module)))
        return made_so[-1]

    monkeypatch.setitem(LAYERS, nn.Conv2d, patched)
    monkeypatch.setattr(Stacked, "_agrees", lambda *arguments: True)
    test_it_trains_as_autograd_does(kind, sgd)
    assert {len(layer.weight.value) for layer in made_so} == {1, 2}, "two of the clients have as many full batches"


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(PAIRS, PAIRS, PAIRS, st.tuples(st.integers(0, 2), st.integers(0, 2)), st.booleans())
def test_patches_are_those_of_the_convolution(kernel, stride, dilation, padding, has_bias):
    options = {"stride": stride, "dilation": dilation, "padding": padding, "bias": has_bias}
    module = nn.Conv2d(2, 3, kernel, **options)
    rng = torch.Generator().manual_seed(1)
    x = torch.rand(4, 5, 2, 9, 8, generator=rng, dtype=torch.float64)
    found = []
    for layer_of in (layers.Conv2d, lambda *parts: PatchedConv2d(*parts, padding)):
        parameters = {
            name: Parameter(torch.linspace(-1, 1, 4 * own.numel(), dtype=x.dtype).view(4, *own.shape), None, PLAIN)
            for name, own in module.named_parameters()
        }
        layer = layer_of(module, parameters)
        y = layer.forward(x)
        g = torch.rand(y.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
        below = layer.backward(g, needs_input=True)
        found.append([y, below, *(each.value for each in parameters.values())])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 0])
@pytest.mark.parametrize("name", ["logistic", "mlp", "2nn"])
def test_looking_ahead_is_the_same_mathematics(name, batch_size):
    """The first layer of 2nn takes blocks of 60, 20 and 6 steps here; whole ones, others, and single steps."""
    module = made(models.MODELS[name], torch.float64)
    clients = work(1, 75, 44, 140, epochs=2)
    ours = stacked(module, PLAIN, batch_size).train(start(module), EXAMPLES, clients)
    theirs = Loop(module, PLAIN, batch_size).train(start(module), EXAMPLES, clients)
    for a, b in zip(ours, theirs, strict=True):
        assert a.num_steps == b.num_steps
        assert a.train_loss == pytest.approx(b.train_loss, rel=1e-9)
        torch.testing.assert_close(a.weights.flat, b.weights.flat, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("leaves", "sgd", "batch_size", "block"),
    [
        ([nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10)], PLAIN, 10, 6),
        ([nn.Identity(), nn.Flatten(), nn.Linear(784, 200)], PLAIN, 1, 60),
        ([nn.Flatten(), nn.Linear(784, 64)], PLAIN, 32, 1),  # a block would cost more than it saves
        ([nn.Flatten(), nn.Linear(784, 200)], HEAVY, 10, 1),
        ([nn.Flatten(), nn.Linear(784, 200)], Sgd(0.1, weight_decay=0.1), 10, 1),
        ([nn.Flatten(), nn.Linear(784, 200)], PLAIN, 0, 1),
        ([nn.Flatten(), nn.Tanh(), nn.Linear(784, 200)], PLAIN, 10, 1),
        ([nn.Conv2d(1, 200, 3), nn.Flatten(), nn.Linear(784, 200)], PLAIN, 10, 1),
    ],
    ids=str,
)
def test_when_the_first_layer_looks_ahead(leaves, sgd, batch_size, block):
    assert worthwhile_block(leaves, sgd, batch_size) == block


@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_a_step_in_float32_is_that_of_autograd_to_1e_6(kind):
    module = made(EXAMPLE_MODELS[kind])
    clients = work(10, 10)
    ours = stacked(module, PLAIN, 10).train(start(module), EXAMPLES, clients)
    theirs = Loop(module, PLAIN, 10).train(start(module), EXAMPLES, clients)
    for a, b in zip(ours, theirs, strict=True):
        difference = (a.weights.flat - b.weights.flat).norm() / b.weights.flat.norm()
        assert difference < 1e-6
        assert a.train_loss == pytest.approx(b.train_loss, rel=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_a_convolution_gives_has_its_channels_innermost(channels):
    """In the other order torch has slower kernels, for itself and for what follows."""
    module, images = nn.Conv2d(channels, 4, 3), torch.rand(1, 2, channels, 8, 8)
    parameters = {name: Parameter(p.detach()[None], None, PLAIN) for name, p in module.named_parameters()}
    with torch.inference_mode():
        y = layers.Conv2d(module, parameters).forward(images)
        torch.testing.assert_close(y[0], module(images[0]))
    assert y[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(2), nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True), nn.MaxPool2d(2, dilation=2)],
    ids=str,
)
def test_pooling_before_a_relu_changes_no_bit(monkeypatch, pool):
    size = pool(torch.zeros(1, 4, 10, 8)).numel()
    module = made(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(size, CLASSES)))

    def both() -> tuple[list[tuple[int, float, bytes]], list[Evaluation]]:
        trained = stacked(module, HEAVY, 10).train(start(module), EXAMPLES, work(35, 60, epochs=2))
        tested = stacked(module, HEAVY, 10).evaluate(trained[0].weights, EXAMPLES, [(0, 300)], [0])
        return [bits(each) for each in trained], tested

    assert [type(layer) for _, layer in stack.pooled_first(module)][1:3] == [nn.MaxPool2d, nn.ReLU]
    swapped = both()
    monkeypatch.setattr(stack, "pooled_first", lambda module: list(stack.leaves(module)))
    assert both() == swapped


@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_it_evaluates_as_the_module_does(kind):
    module = made(EXAMPLE_MODELS[kind])
    chunks = [(0, 130), (130, 300)]  # more and fewer than are computed at once
    ours = stacked(module, PLAIN, 10).evaluate(start(module), EXAMPLES, chunks, [0, 0])
    theirs = Loop(module, PLAIN, 10).evaluate(start(module), EXAMPLES, chunks, [0, 0])
    for a, b in zip(ours, theirs, strict=True):
        assert a.num_examples == b.num_examples
        assert a.loss_sum == pytest.approx(b.loss_sum, rel=1e-5)
        assert abs(a.num_correct - b.num_correct) <= 1


@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_of_the_table_can_be_stacked(name):
    module = models.build(models.MODELS[name], (1, 28, 28), 10, seed=0)
    assert obstacle(module, (1, 28, 28), 10) is None


def test_it_changes_neither_the_global_weights_nor_the_module():
    module = made(EXAMPLE_MODELS[nn.Conv2d])
    weights = start(module)
    before = weights.flat.clone()
    stacked(module, HEAVY, 7).train(weights, EXAMPLES, work(20, 20))
    stacked(module, HEAVY, 7).evaluate(weights, EXAMPLES, [(0, 50)], [0])
    assert torch.equal(weights.flat, before)
    assert torch.equal(start(module).flat, before)


@pytest.mark.parametrize(
    ("batch", "groups"), [(10, [(0, 7)]), (600, [(0, 3), (3, 6), (6, 7)]), (5000, [(k, k + 1) for k in range(7)])]
)
def test_a_gpu_takes_as_many_clients_at_once_as_its_memory_holds(batch, groups):
    many = stacked(made(models.MODELS["mlp"]), PLAIN, batch)
    images = SimpleNamespace(is_cuda=True)
    assert many._together(Piece(slice(0, 7), 0, batch, 1), 1, images) == [(slice(*g), slice(*g)) for g in groups]
    later = many._together(Piece(slice(2, 9), 0, batch, 1), 1, images)
    assert later == [(slice(a + 2, b + 2), slice(a, b)) for a, b in groups]


def test_momentum_starts_at_zero_in_each_fit():
    module = made(EXAMPLE_MODELS[nn.Linear])
    stack = stacked(module, HEAVY, 5)
    first = [bits(t) for t in stack.train(start(module), EXAMPLES, work(20, 20))]
    stack.train(start(module), EXAMPLES, work(30, 25, 20))
    assert first == [bits(t) for t in stack.train(start(module), EXAMPLES, work(20, 20))]


def test_a_loss_that_is_not_finite_is_its_clients_own():
    """One client's examples overflow; its neighbour in the stack does not notice."""
    images = torch.rand(20, *SHAPE)
    images[:10] = 1e38
    examples = Examples(images, torch.arange(20) % CLASSES)
    clients = [Work([torch.arange(10)], 0), Work([torch.arange(10, 20)], 0)]
    module = made(EXAMPLE_MODELS[nn.Linear])
    broken, fine = stacked(module, PLAIN, 5).train(start(module), examples, clients)
    (alone,) = stacked(module, PLAIN, 5).train(start(module), examples, clients[1:])
    assert not torch.isfinite(broken.weights.flat).all()
    assert bits(fine) == bits(alone)


# ---------------------------------------------------------------- equal bits


@pytest.mark.parametrize("sgd", [PLAIN, HEAVY], ids=["plain", "momentum and decay"])
@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_a_client_has_the_same_bits_in_any_stack(kind, sgd):
    """Of any size and with any neighbours; unequal shards, several epochs, short last batches, some of one example."""
    module = made(EXAMPLE_MODELS[kind])
    clients = work(31, 30, 30, 21, 12, 30, 1, 4, epochs=2)
    stack = stacked(module, sgd, 10)
    alone = [bits(stack.train(start(module), EXAMPLES, [client])[0]) for client in clients]
    for size in (2, 3, 5, 8):
        for group in itertools.batched(range(8), size) if hasattr(itertools, "batched") else [range(size)]:
            together = stack.train(start(module), EXAMPLES, [clients[k] for k in group])
            assert [bits(t) for t in together] == [alone[k] for k in group]
    backwards = stack.train(start(module), EXAMPLES, clients[::-1])
    assert [bits(t) for t in backwards] == alone[::-1]


THIN = {
    "to one": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(240, 1), nn.ReLU(), nn.Linear(1, 16), nn.Linear(16, CLASSES)
    ),
    "from one": lambda: nn.Sequential(nn.AvgPool2d((12, 10)), nn.Flatten(), nn.Linear(2, 1), nn.Linear(1, CLASSES)),
}


@pytest.mark.parametrize("name", THIN)
@pytest.mark.parametrize("batch_size", [4, 8, 12, 16])
def test_layers_of_one_unit_change_no_bit(name, batch_size):
    """Their products are of a matrix and a vector; where the unit is dead, a trial would not notice."""
    module = made(THIN[name])
    clients, stack = work(49, 49, 20, 13), stacked(module, Sgd(0.5), batch_size)
    together = [bits(trained) for trained in stack.train(start(module), EXAMPLES, clients)]
    assert together == [bits(stack.train(start(module), EXAMPLES, [client])[0]) for client in clients]
    assert not any(agreed for key, agreed in stack._agreed.items() if key[0] > 1), "whatever a trial says"


@pytest.mark.long
@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=9),
    st.integers(0, 12),
    st.sampled_from(["logistic", "mlp", "2nn"]),
    st.sampled_from([PLAIN, HEAVY]),
)
@example([1, 1, 1], 1, "mlp", PLAIN)  # batches of one example take another kernel
@example([40, 40, 40], 0, "2nn", HEAVY)
def test_any_cohort_has_the_bits_of_its_clients_alone(sizes, batch_size, model, sgd):
    module = made(models.MODELS[model])
    clients, stack = work(*sizes), stacked(module, sgd, batch_size)
    together = stack.train(start(module), EXAMPLES, clients)
    for client, of_stack in zip(clients, [bits(trained) for trained in together], strict=True):
        (alone,) = stack.train(start(module), EXAMPLES, [client])
        assert of_stack == bits(alone)


def test_what_would_not_have_equal_bits_is_computed_alone(monkeypatch):
    """A kernel that rounds differently in a stack is noticed when its shape first occurs, and never used."""
    original = torch.baddbmm

    def rounds_by_the_stack(shift: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        y = original(shift, x, weight)
        return y if len(x) == 1 else original(shift.double(), x.double(), weight.double()).float()

    module = made(EXAMPLE_MODELS[nn.Linear])
    clients = work(20, 20, 20)
    expected = [bits(t) for t in stacked(module, PLAIN, 10).train(start(module), EXAMPLES, clients)]
    monkeypatch.setattr(torch, "baddbmm", rounds_by_the_stack)
    assert [bits(t) for t in stacked(module, PLAIN, 10).train(start(module), EXAMPLES, clients)] == expected
    monkeypatch.setattr(Stacked, "_agrees", lambda *_: True)
    assert [bits(t) for t in stacked(module, PLAIN, 10).train(start(module), EXAMPLES, clients)] != expected


@pytest.mark.parametrize("gather", [1, 10, 37, 10_000])
def test_how_many_examples_are_gathered_at_once_changes_no_bit(monkeypatch, gather):
    module = made(EXAMPLE_MODELS[nn.Linear])
    expected = [bits(t) for t in stacked(module, PLAIN, 10).train(start(module), EXAMPLES, work(25, 30))]
    monkeypatch.setattr(engine, "_GATHER", gather)
    assert [bits(t) for t in stacked(module, PLAIN, 10).train(start(module), EXAMPLES, work(25, 30))] == expected


# ---------------------------------------------------------------- pieces


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(0, 20), st.integers(1, 7))
def test_pieces_are_each_clients_batches_in_their_order(sizes, batch_size, block):
    sizes = sorted(sizes, reverse=True)
    taken: list[list[tuple[int, int]]] = [[] for _ in sizes]
    blocks: list[list[int]] = [[] for _ in sizes]
    for piece in pieces(sizes, batch_size, block):
        assert piece.num_steps > 0
        for k in range(len(sizes))[piece.clients]:
            blocks[k] += [min(block, piece.num_steps - step) for step in range(0, piece.num_steps, block)]
        for k in range(len(sizes))[piece.clients]:
            taken[k] += [
                (piece.start + step * piece.batch, piece.start + (step + 1) * piece.batch)
                for step in range(piece.num_steps)
            ]
    for size, batches in zip(sizes, taken, strict=True):
        cuts = range(0, size, batch_size or size)
        assert batches == [(cut, min(cut + (batch_size or size), size)) for cut in cuts]
    alone = [list(pieces([size], batch_size, block)) for size in sizes]
    assert blocks == [
        [min(block, p.num_steps - step) for p in own for step in range(0, p.num_steps, block)] for own in alone
    ], "where a client's blocks lie does not depend on its neighbours"


def test_equal_clients_take_every_step_together():
    assert list(pieces([25, 25, 25], 10)) == [Piece(slice(0, 3), 0, 10, 2), Piece(slice(0, 3), 20, 5, 1)]
    assert list(pieces([25, 25], 0)) == [Piece(slice(0, 2), 0, 25, 1)]


# ---------------------------------------------------------------- what it cannot run


class Subclassed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def shared() -> nn.Module:
    layer = nn.Linear(240, 240)
    return nn.Sequential(nn.Flatten(), layer, layer, nn.Linear(240, CLASSES))


def tied() -> nn.Module:
    one, other = nn.Linear(240, 240), nn.Linear(240, 240)
    other.weight = one.weight
    return nn.Sequential(nn.Flatten(), one, other, nn.Linear(240, CLASSES))


def hooked() -> nn.Module:
    module = made(EXAMPLE_MODELS[nn.Linear])
    module[1].register_forward_hook(lambda layer, inputs, output: output * 2)
    return module


def hooked_as_a_whole() -> nn.Module:
    module = made(EXAMPLE_MODELS[nn.ReLU])
    module[2].register_forward_pre_hook(lambda layer, inputs: None)
    return module


def patched() -> nn.Module:
    module = made(EXAMPLE_MODELS[nn.Linear])
    module[1].forward = lambda x: x[:, :7]
    return module


def frozen() -> nn.Module:
    module = made(EXAMPLE_MODELS[nn.Linear])
    module[1].bias.requires_grad_(False)
    return module


class Sub(nn.Sequential):
    pass


HEAD = (nn.Flatten(), nn.Linear(240, CLASSES))


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (lambda: Subclassed(240, CLASSES), "Subclassed is not an nn.Sequential"),
        (lambda: Sub(*HEAD), "Sub is not an nn.Sequential"),
        (lambda: nn.Sequential(nn.Flatten(), Subclassed(240, CLASSES)), "layer 1, Subclassed, is none of Linear, "),
        (lambda: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Dropout(), nn.Linear(240, 4))), "layer 1.0, Dropout,"),
        (lambda: nn.Sequential(nn.BatchNorm2d(2), *HEAD), "layer 0, BatchNorm2d,"),
        (shared, "layer 2, Linear, is used twice"),
        (tied, "layer 2, Linear, is used twice"),
        (hooked, "layer 1, Linear, has hooks"),
        (hooked_as_a_whole, "layer 2, Sequential, has hooks"),
        (patched, "layer 1, Linear, has hooks or a forward of its own"),
        (frozen, "layer 1, Linear, has frozen parameters"),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), *HEAD), "padding_mode='reflect'"),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 4, padding="same"), *HEAD), "padding='same' differs from side to side"),
        (lambda: nn.Sequential(nn.MaxPool2d(1, return_indices=True), *HEAD), "return_indices"),
        (lambda: nn.Sequential(nn.Flatten(0, 1), *HEAD), "Flatten of dimensions 0 to 1"),
        (lambda: nn.Sequential(nn.Linear(10, 2), nn.Flatten(), nn.Linear(48, CLASSES)), ""),  # on images
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, CLASSES)), "Expected size"),
        (lambda: nn.Sequential(nn.Conv2d(2, 3, 3)), "outputs of shape 3x10x8 where there are 4 classes"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(240, 10)), "outputs of shape 10 where there are 4 classes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_obstacle_is_named(factory, said):
    found = obstacle(made(factory), SHAPE, CLASSES)
    assert found is not None
    assert said in found
    assert len(found.splitlines()) == 1


def with_batch_norm(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, num_classes))


CONFIG = Config().override({"data.dataset": "synthetic", "placement.mode": "serial", "rounds": 0})


def test_an_engine_that_cannot_run_the_model_is_refused_by_the_layer():
    with pytest.raises(ConfigError) as caught:
        prepare(CONFIG.override({"training.engine": "stacked"}), model=with_batch_norm)
    message = str(caught.value)
    assert message.startswith("training.engine = 'stacked' cannot run this model: layer 1, BatchNorm1d, is none of ")
    assert message.endswith("; the loop engine can, auto takes it")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("asked", "model", "engine"),
    [
        ("auto", None, "stacked"),
        ("stacked", None, "stacked"),
        ("loop", None, "loop"),
        ("auto", with_batch_norm, "loop"),
        ("loop", with_batch_norm, "loop"),
    ],
)
def test_which_engine_runs(asked, model, engine):
    x = prepare(CONFIG.override({"training.engine": asked}), model=model)
    assert x.spec.engine == engine
    assert (x.obstacle is None) == (model is None)
