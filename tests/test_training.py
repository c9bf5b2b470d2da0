import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim import datasets, models, training
from fedsim.numerics import numerics, set_numerics
from fedsim.training import Examples, Sgd, batches, evaluate, local_sgd, pixels

CPU = torch.device("cpu")
SHAPE, CLASSES = (1, 4, 4), 3
RNG = np.random.Generator(np.random.PCG64(0))
EXAMPLES = Examples(
    torch.from_numpy(RNG.integers(256, size=(50, *SHAPE), dtype=np.uint8)),
    torch.from_numpy(RNG.integers(CLASSES, size=50)),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with numerics(1):
        yield


def made(factory: Callable[..., nn.Module]) -> nn.Module:
    """The same module each time."""
    return models.build(factory, SHAPE, CLASSES, seed=3)


def small() -> nn.Module:
    return made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES)))


def logistic() -> nn.Module:
    return made(models.MODELS["logistic"])


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).flatten(1))


def with_batch_norm() -> nn.Module:
    return made(WithBatchNorm)


class PartlyUsed(nn.Module):
    """A parameter that the loss does not depend on, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.full((CLASSES,), 0.5), requires_grad=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) + self.frozen


def partly_used() -> nn.Module:
    return made(PartlyUsed)


def orders(*lengths: int) -> list[Tensor]:
    rng = np.random.Generator(np.random.PCG64(1))
    return [torch.from_numpy(rng.permutation(50)[:n]) for n in lengths]


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


def by_torch_optim(
    module: nn.Module, epochs: list[Tensor], batch_size: int, **options: float
) -> tuple[int, list[float], list[int]]:
    """The same training with torch's own optimizer and backward; the losses and sizes of the steps."""
    optimizer = torch.optim.SGD(module.parameters(), foreach=False, **options)
    module.train()
    losses, sizes = [], []
    for order in epochs:
        for some in order.split(batch_size or len(order)):
            loss = F.cross_entropy(module(EXAMPLES.images[some].float() / 255), EXAMPLES.labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            sizes.append(len(some))
    return len(losses), losses, sizes


# ---------------------------------------------------------------- local SGD


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("lr", [0.003, 0.1, 1.0])
def test_each_step_is_that_of_torch_optim_sgd_to_the_bit(lr, momentum, weight_decay):
    options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    ours, theirs = small(), small()
    assert bits(ours) == bits(theirs)
    for num_examples in range(7, 43, 7):  # batches of 7: after 1, 2, ... steps
        ours, theirs = small(), small()
        epochs = orders(num_examples)
        local_sgd(ours, EXAMPLES, iter(epochs), batch_size=7, sgd=Sgd(**options))
        by_torch_optim(theirs, epochs, 7, **options)
        assert bits(ours) == bits(theirs)
    assert bits(ours) != bits(small())


@pytest.mark.parametrize("factory", [small, logistic, with_batch_norm, partly_used], ids=lambda f: f.__name__)
@pytest.mark.parametrize("batch_size", [1, 7, 10, 0, 1000], ids=lambda size: f"B={size}")
def test_whole_trainings_are_those_of_torch_optim(factory, batch_size):
    """Several epochs, with a short last batch, all as one batch, and batches larger than the shard."""
    ours, theirs = factory(), factory()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.001}
    epochs = orders(23, 23, 23)
    num_steps, train_loss = local_sgd(ours, EXAMPLES, iter(epochs), batch_size=batch_size, sgd=Sgd(**options))
    expected_steps, losses, sizes = by_torch_optim(theirs, epochs, batch_size, **options)
    assert bits(ours) == bits(theirs)
    assert num_steps == expected_steps == 3 * math.ceil(23 / (batch_size or 23))
    assert train_loss == sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / 69


def test_what_the_loss_does_not_depend_on_stays():
    """Not even weight decay touches it: torch.optim skips a parameter without a gradient."""
    module = partly_used()
    local_sgd(module, EXAMPLES, iter(orders(20)), batch_size=5, sgd=Sgd(lr=0.1, momentum=0.9, weight_decay=0.1))
    assert module.unused.tolist() == [1.0, 1.0]
    assert module.frozen.tolist() == [0.5] * CLASSES
    assert bits(module) != bits(partly_used())


def test_momentum_starts_at_zero_in_each_fit():
    """Two fits differ from one of twice the epochs: the second starts without the first one's velocity."""
    options = {"lr": 0.1, "momentum": 0.9}
    one, other = orders(20, 20)
    twice, theirs, once = small(), small(), small()
    for order in (one, other):
        local_sgd(twice, EXAMPLES, iter([order]), batch_size=5, sgd=Sgd(**options))
        by_torch_optim(theirs, [order], 5, **options)
    local_sgd(once, EXAMPLES, iter([one, other]), batch_size=5, sgd=Sgd(**options))
    assert bits(twice) == bits(theirs)
    assert bits(twice) != bits(once)


def test_the_gradient_is_the_mean_over_the_batch():
    """Logistic regression by hand: the gradient is the mean of (p - y) x."""
    module = logistic()
    order = orders(6)[0]
    x = EXAMPLES.images[order].numpy().reshape(6, -1).astype(np.float64) / 255
    w, b = (p.detach().numpy().astype(np.float64) for p in module.parameters())
    logits = x @ w.T + b
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    error = p - np.eye(CLASSES)[EXAMPLES.labels[order].numpy()]
    _, loss = local_sgd(module, EXAMPLES, iter([order]), batch_size=0, sgd=Sgd(lr=0.5))
    np.testing.assert_allclose(module[1].weight.detach(), w - 0.5 * error.T @ x / 6, rtol=0, atol=1e-6)
    np.testing.assert_allclose(module[1].bias.detach(), b - 0.5 * error.mean(axis=0), rtol=0, atol=1e-6)
    assert loss == pytest.approx(-np.log(p[range(6), EXAMPLES.labels[order]]).mean(), rel=1e-6)


def test_the_loss_is_the_mean_over_examples_each_before_its_step():
    """5 + 5 + 1 examples: a mean of the batches' means would give the last example five times its weight."""
    module, stepped = small(), small()
    order = orders(11)[0]
    by_hand = 0.0
    for some in order.split(5):
        with torch.no_grad():
            images = EXAMPLES.images[some].float() / 255
            by_hand += len(some) * F.cross_entropy(stepped(images), EXAMPLES.labels[some]).item()
        local_sgd(stepped, EXAMPLES, iter([some]), batch_size=0, sgd=Sgd(lr=0.3))
    num_steps, loss = local_sgd(module, EXAMPLES, iter([order]), batch_size=5, sgd=Sgd(lr=0.3))
    assert (num_steps, loss) == (3, by_hand / 11)
    assert bits(module) == bits(stepped)


def test_the_loss_goes_down_on_data_that_can_be_learned():
    data = datasets.load("synthetic")
    examples = Examples(torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels))
    module = models.build(models.MODELS["logistic"], data.input_shape, data.num_classes, seed=0)
    order = torch.arange(500)
    losses = [local_sgd(module, examples, iter([order]), batch_size=20, sgd=Sgd(lr=0.1))[1] for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < math.log(data.num_classes) / 2, "half of what guessing has"
    tested = evaluate(module, examples, 0, 500)
    assert tested.num_correct > 0.8 * tested.num_examples


def test_it_trains_in_training_mode_also_after_an_evaluation():
    module = with_batch_norm()
    evaluate(module, EXAMPLES, 0, 10)
    tracked = module.norm.num_batches_tracked.item()
    local_sgd(module, EXAMPLES, iter(orders(20)), batch_size=10, sgd=Sgd(lr=0.1))
    assert module.norm.num_batches_tracked.item() == tracked + 2


def test_it_leaves_no_gradients_behind():
    module = small()
    local_sgd(module, EXAMPLES, iter(orders(20)), batch_size=10, sgd=Sgd(lr=0.1))
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in module.parameters())


# ---------------------------------------------------------------- batches


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(1, 3000), st.integers(0, 2000), st.sampled_from([1, 2, 64, 1024]))
def test_batches_are_the_order_cut_into_pieces(num_examples, batch_size, gather):
    """Each example once and in order, whatever is brought together at once, and never much more than that."""
    examples = Examples(torch.arange(3000.0).view(-1, 1, 1, 1), torch.arange(3000))
    order = torch.from_numpy(np.random.Generator(np.random.PCG64(num_examples)).permutation(3000)[:num_examples])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_GATHER", gather)
        cut = list(batches(examples, order, batch_size, torch.float32))
    assert torch.equal(torch.cat([labels for _, labels in cut]), order)
    assert torch.equal(torch.cat([images for images, _ in cut]).flatten(), order.float())
    size = batch_size or num_examples
    full, last = divmod(num_examples, size)
    assert [len(labels) for _, labels in cut] == [size] * full + [last] * (last > 0)
    assert all(images.shape == (len(labels), 1, 1, 1) for images, labels in cut)
    largest = max(images.untyped_storage().nbytes() // images.element_size() for images, _ in cut)
    assert largest <= max(size, gather)


def test_batches_may_have_an_example_twice():
    """As shards drawn with replacement do."""
    order = torch.tensor([3, 1, 3, 3])
    cut = list(batches(EXAMPLES, order, 3, torch.float32))
    assert torch.equal(torch.cat([labels for _, labels in cut]), EXAMPLES.labels[order])


def test_pixels_are_bytes_over_255():
    every_byte = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    single = pixels(every_byte, torch.float32).numpy().reshape(-1)
    assert single.dtype == np.float32
    assert single.tobytes() == (np.arange(256, dtype=np.float32) / np.float32(255)).tobytes()
    double = pixels(every_byte, torch.float64).numpy().reshape(-1)
    assert double.tobytes() == (np.arange(256) / 255).tobytes()
    assert every_byte.flatten().tolist() == list(range(256)), "not changed"


def test_floats_are_used_as_they_are():
    images = torch.tensor([-3.5, 0.0, 255.0]).view(-1, 1, 1, 1)
    assert torch.equal(pixels(images, torch.float32), images)
    assert pixels(images, torch.float64).dtype == torch.float64


def test_training_on_bytes_is_training_on_bytes_over_255():
    ours, floats = small(), small()
    scaled = Examples(EXAMPLES.images.float() / 255, EXAMPLES.labels)
    local_sgd(ours, EXAMPLES, iter(orders(23)), batch_size=5, sgd=Sgd(lr=0.1))
    local_sgd(floats, scaled, iter(orders(23)), batch_size=5, sgd=Sgd(lr=0.1))
    assert bits(ours) == bits(floats)


def test_training_leaves_the_examples_as_they_were():
    examples = Examples(EXAMPLES.images.float(), EXAMPLES.labels.clone())

    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.sub_(0.5).flatten(1))  # in place

    local_sgd(Careless(), examples, iter(orders(23)), batch_size=5, sgd=Sgd(lr=0.1))
    assert torch.equal(examples.images, EXAMPLES.images.float())


# ---------------------------------------------------------------- evaluation


def test_evaluation_by_hand():
    module = small()
    with torch.no_grad():
        logits = module(EXAMPLES.images[10:40].float() / 255).double().numpy()
    labels = EXAMPLES.labels[10:40].numpy()
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[range(30), labels]
    loss_sum, num_correct, num_examples = astuple(evaluate(module, EXAMPLES, 10, 40))
    assert loss_sum == pytest.approx(losses.sum(), rel=1e-12)
    assert num_correct == (logits.argmax(axis=1) == labels).sum()
    assert num_examples == 30
    assert (type(loss_sum), type(num_correct), type(num_examples)) == (float, int, int)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 49), unique=True, max_size=6).map(sorted))
def test_chunks_sum_to_the_whole(cuts):
    module = small()
    pieces = [astuple(evaluate(module, EXAMPLES, start, stop)) for start, stop in itertools.pairwise([0, *cuts, 50])]
    whole = astuple(evaluate(module, EXAMPLES, 0, 50))
    assert sum(loss for loss, _, _ in pieces) == pytest.approx(whole[0], rel=1e-6)
    assert sum(correct for _, correct, _ in pieces) == whole[1]
    assert sum(count for _, _, count in pieces) == whole[2] == 50


def test_all_right_and_all_wrong():
    class Oracle(nn.Module):
        def __init__(self, answer: int) -> None:
            super().__init__()
            self.logits = nn.Parameter(20.0 * torch.eye(CLASSES)[answer])

        def forward(self, x: Tensor) -> Tensor:
            return self.logits.expand(len(x), CLASSES)

    ones = Examples(EXAMPLES.images, torch.ones(50, dtype=torch.int64))
    loss, correct, _ = astuple(evaluate(Oracle(1), ones, 0, 50))
    assert correct == 50
    assert loss == pytest.approx(50 * math.log1p(2 * math.exp(-20)), rel=1e-6)
    loss, correct, _ = astuple(evaluate(Oracle(2), ones, 0, 50))
    assert correct == 0
    assert loss == pytest.approx(50 * 20, rel=1e-6)


def test_evaluation_is_in_evaluation_mode():
    plain = small()
    with_dropout = nn.Sequential(plain[0], nn.Dropout(0.5), plain[1], plain[2], plain[3]).train()
    before = torch.get_rng_state()
    assert evaluate(with_dropout, EXAMPLES, 0, 50) == evaluate(plain, EXAMPLES, 0, 50)
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_changes_nothing():
    module = with_batch_norm()
    before = bits(module)
    assert evaluate(module, EXAMPLES, 0, 50) == evaluate(module, EXAMPLES, 0, 50)
    assert bits(module) == before
    assert all(p.grad is None for p in module.parameters())


# ---------------------------------------------------------------- numerics


def flushes_denormals() -> bool:
    return bool(torch.tensor(1e-310, dtype=torch.float64).mul(1) == 0)


def precisions() -> list[str]:
    b = torch.backends
    return [x.fp32_precision for x in (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.conv, b.mkldnn.matmul)]


def everything_set() -> dict:
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "flush": flushes_denormals(),
        "precisions": precisions(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
    }


@pytest.fixture
def strange_settings() -> Iterator[dict]:
    """A caller with other settings than fedsim's in everything."""
    kept = everything_set()
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    can_flush = torch.set_flush_denormal(True)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    try:
        strange = everything_set()
        assert strange["threads"] == 2
        assert strange["flush"] == can_flush
        assert strange["precisions"][:2] == ["tf32", "tf32"]
        yield strange
    finally:
        torch.set_num_threads(kept["threads"])
        torch.set_default_dtype(kept["dtype"])
        torch.set_flush_denormal(kept["flush"])
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = kept["precisions"][:2]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = kept["cudnn"]


OURS = {"dtype": torch.float32, "flush": False, "precisions": ["ieee"] * 5, "cudnn": (True, False)}


def test_numerics_sets_everything_and_puts_the_callers_settings_back(strange_settings):
    with numerics(3):
        inside = everything_set()
        assert inside.items() >= (OURS | {"threads": 3}).items()
    assert everything_set() == strange_settings


def test_numerics_puts_the_callers_settings_back_after_an_error(strange_settings):
    inside = []

    def fails() -> None:
        with numerics(1):
            inside.append(everything_set())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert inside[0]["dtype"] == torch.float32
    assert everything_set() == strange_settings


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_numerics_puts_back_what_was_set_the_old_way(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        before = precisions()
        assert before != OURS["precisions"]
        with numerics(1):
            assert precisions() == OURS["precisions"]
        assert precisions() == before
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_set_numerics_is_for_good(strange_settings):
    with numerics(2):  # puts back what set_numerics leaves
        torch.set_default_dtype(torch.float64)
        torch.set_flush_denormal(True)
        set_numerics(1)
        assert everything_set().items() >= (OURS | {"threads": 1}).items()
    assert everything_set() == strange_settings


def test_denormals_survive_training():
    """Flushed to zero they would not: a weight of 1e-40 that has no gradient keeps its bits."""
    module = logistic()
    with torch.no_grad():
        module[1].weight.fill_(1e-40)
    blank = Examples(torch.zeros(4, *SHAPE, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    local_sgd(module, blank, iter([torch.arange(4)]), batch_size=2, sgd=Sgd(lr=0.1))
    assert (module[1].weight == torch.tensor(1e-40)).all()
    assert (module[1].weight > 0).all()


# ---------------------------------------------------------------- global generators


def test_training_and_evaluation_leave_the_global_generators_alone():
    def states() -> tuple:
        numpy_state = np.random.get_state()[1].tobytes()  # noqa: NPY002 - the global one is what is looked at
        return random.getstate(), numpy_state, torch.get_rng_state().numpy().tobytes()

    before = states()
    module = small()
    local_sgd(module, EXAMPLES, iter(orders(23)), batch_size=5, sgd=Sgd(lr=0.1, momentum=0.9))
    evaluate(module, EXAMPLES, 0, 50)
    assert states() == before
