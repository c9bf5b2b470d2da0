import hashlib
import math
import re
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from fedsim.errors import ConfigError
from fedsim.models import MODELS, build
from fedsim.weights import Layout, Weights, cosines, l2_norm, read_only_tensor, sha256

HAND_MADE = Weights(torch.tensor([1.0, -2.5, 0.0, 3.0e-41]), torch.tensor([7, -1]))


class Everything(nn.Module):
    """What a layout has to know: all kinds of tensors, in an order that is not that of the layout."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))
        self.register_buffer("seen", torch.tensor([5, 6, 7], dtype=torch.int32))
        self.register_buffer("scratch", torch.tensor([9.0]), persistent=False)
        self.register_buffer("mask", torch.tensor([[True, False]]))
        self.first = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Parameter(torch.tensor([4.0]), requires_grad=False)
        self.shared = nn.Linear(3, 3, bias=False)
        self.again = nn.Linear(3, 3)
        self.again.weight = self.shared.weight  # tied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.shared(self.norm(self.first(x.flatten(1)))))


def everything() -> nn.Module:
    return build(Everything, (1, 1, 2), 3, seed=1)


def distinct(layout: Layout) -> Weights:
    """Weights of which every value is another one; booleans alternate."""
    integers = [torch.arange(e.start, e.stop) % (2 if e.dtype == torch.bool else 99) for e in layout.integers]
    return Weights(torch.arange(layout.num_values, dtype=torch.float32) / 7, torch.cat(integers))


# ---------------------------------------------------------------- the layout


@pytest.mark.parametrize("name", MODELS)
def test_the_layout_of_a_model_is_its_parameters_one_after_the_other(name):
    module = build(MODELS[name], (1, 28, 28), 10, seed=0)
    layout = Layout.of(module)
    parameters = dict(module.named_parameters())
    assert [e.name for e in layout.floats] == list(parameters)
    assert layout.integers == ()
    start = 0
    for entry in layout.floats:
        assert entry.shape == parameters[entry.name].shape
        assert (entry.start, entry.stop) == (start, start + parameters[entry.name].numel())
        assert (entry.dtype, entry.trainable) == (torch.float32, True)
        start = entry.stop
    assert layout.num_values == start == sum(p.numel() for p in module.parameters())


def test_a_layout_has_parameters_then_floating_buffers_and_integer_buffers_apart():
    layout = Layout.of(everything())
    assert [(e.name, e.start, e.stop, e.trainable) for e in layout.floats] == [
        ("frozen", 0, 1, False),
        ("first.weight", 1, 7, True),
        ("first.bias", 7, 10, True),
        ("norm.weight", 10, 13, True),
        ("norm.bias", 13, 16, True),
        ("shared.weight", 16, 25, True),  # once, though tied to again.weight
        ("again.bias", 25, 28, True),
        ("scale", 28, 30, False),
        ("norm.running_mean", 30, 33, False),
        ("norm.running_var", 33, 36, False),
    ]
    assert [(e.name, e.shape, e.dtype, e.start, e.stop) for e in layout.integers] == [
        ("seen", (3,), torch.int32, 0, 3),
        ("mask", (1, 2), torch.bool, 3, 5),
        ("norm.num_batches_tracked", (), torch.int64, 5, 6),
    ]
    assert layout.num_values == 36
    assert not [e for e in (*layout.floats, *layout.integers) if e.name == "scratch"], "not part of the weights"


@pytest.mark.parametrize(
    ("dtype", "message"),
    [(torch.float16, "float16"), (torch.bfloat16, "bfloat16"), (torch.complex64, "complex64")],
)
def test_a_type_that_cannot_be_averaged_is_refused_with_the_tensors_name(dtype, message):
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].weight = nn.Parameter(module[0].weight.detach().to(dtype))
    with pytest.raises(ConfigError, match=rf"0\.weight is torch\.{message}"):
        Layout.of(module)
    buffered = nn.Linear(2, 2)
    buffered.register_buffer("extra", torch.zeros(2, dtype=dtype))
    with pytest.raises(ConfigError, match=rf"extra is torch\.{message}"):
        Layout.of(buffered)


def test_mixed_types_are_refused():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ConfigError, match=r"mixes torch\.float32, torch\.float64"):
        Layout.of(module)
    assert Layout.of(module.double()).floats[0].dtype == torch.float64


@pytest.mark.parametrize(
    "module", [nn.Flatten(), nn.Linear(2, 2).requires_grad_(False), nn.BatchNorm1d(2, affine=False)], ids=str
)
def test_nothing_to_train_is_refused(module):
    with pytest.raises(ConfigError, match="no parameter to train"):
        Layout.of(module)


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("factory", [*MODELS.values(), Everything], ids=[*MODELS, "everything"])
def test_flatten_load_and_flatten_again(factory):
    source = build(factory, (1, 28, 28), 10, seed=1) if factory is not Everything else everything()
    target = build(factory, (1, 28, 28), 10, seed=2) if factory is not Everything else everything()
    layout = Layout.of(source)
    given_ = distinct(layout) if layout.integers else layout.flatten(source)
    layout.load(target, given_)
    back = layout.flatten(target)
    assert torch.equal(back.flat, given_.flat)
    assert torch.equal(back.integers, given_.integers)
    assert (back.flat.dtype, back.integers.dtype) == (torch.float32, torch.int64)
    assert (back.flat.shape, back.integers.dim()) == ((layout.num_values,), 1)


def test_each_value_goes_to_its_own_place():
    module = everything()
    layout = Layout.of(module)
    layout.load(module, distinct(layout))
    for entry in layout.floats:
        by_hand = torch.arange(entry.start, entry.stop, dtype=torch.float32) / 7
        assert torch.equal(module.state_dict()[entry.name], by_hand.view(entry.shape))
    assert module.seen.tolist() == [0, 1, 2]
    assert module.seen.dtype == torch.int32
    assert module.mask.tolist() == [[True, False]]
    assert module.norm.num_batches_tracked.item() == 5
    assert module.again.weight is module.shared.weight, "still tied"
    assert module.scratch.tolist() == [9.0], "not part of the weights"


def test_loading_keeps_the_modules_own_tensors_and_what_can_be_trained():
    module = everything()
    before = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in module.named_parameters()}
    layout = Layout.of(module)
    layout.load(module, distinct(layout))
    assert {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in module.named_parameters()} == before


@pytest.mark.parametrize("factory", [lambda: nn.Linear(3, 1, bias=False), everything], ids=["one tensor", "everything"])
def test_flatten_is_a_copy(factory):
    module = factory()
    layout = Layout.of(module)
    before = layout.flatten(module)
    kept = Weights(before.flat.clone(), before.integers.clone())
    before.flat.add_(1)
    before.integers.add_(1)
    again = layout.flatten(module)
    assert torch.equal(again.flat, kept.flat)
    assert torch.equal(again.integers, kept.integers)


def test_unflatten_gives_tensors_as_the_module_has_them():
    module = everything()
    layout = Layout.of(module)
    tensors = layout.unflatten(distinct(layout))
    layout.load(module, distinct(layout))
    expected = {name: tensor for name, tensor in module.state_dict().items() if name in tensors}
    assert set(tensors) == {e.name for e in (*layout.floats, *layout.integers)}
    for name, tensor in expected.items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("name", MODELS)
def test_a_module_takes_what_unflatten_gives(name):
    source, target = (build(MODELS[name], (1, 28, 28), 10, seed=seed) for seed in (1, 2))
    layout = Layout.of(source)
    target.load_state_dict(layout.unflatten(layout.flatten(source)))
    assert torch.equal(layout.flatten(target).flat, layout.flatten(source).flat)


def test_unflattened_floats_are_copies():
    layout = Layout.of(everything())
    weights = distinct(layout)
    tensors = layout.unflatten(weights)
    tensors["first.weight"].zero_()
    tensors["seen"].zero_()
    assert torch.equal(weights.flat, distinct(layout).flat)
    assert torch.equal(weights.integers, distinct(layout).integers)


def test_arrays_are_read_in_place_also_where_they_cannot_be_written():
    flat, integers = HAND_MADE.arrays()
    frozen = flat.copy(), integers.copy()
    for array in frozen:
        array.flags.writeable = False
    weights = Weights.of_arrays(frozen)
    assert weights.flat.data_ptr() == frozen[0].ctypes.data
    assert weights.sha256() == HAND_MADE.sha256()
    assert read_only_tensor(frozen[1]).tolist() == [7, -1]


def test_num_bytes():
    assert HAND_MADE.num_bytes == 4 * 4 + 2 * 8
    module = build(MODELS["mlp"], (1, 28, 28), 10, 0)
    assert Layout.of(module).flatten(module).num_bytes == 50_890 * 4


# ---------------------------------------------------------------- hashes


def test_the_hash_is_sha256_over_little_endian_floats_then_integers():
    by_hand = struct.pack("<4f", 1.0, -2.5, 0.0, 3.0e-41) + struct.pack("<2q", 7, -1)
    assert HAND_MADE.sha256() == hashlib.sha256(by_hand).hexdigest()
    assert HAND_MADE.sha256() == "9fd5bab7277f985c5dae789416e26e842610effb0a7150fb007200766b6640ef"


def test_the_hash_of_weights_without_integers_is_that_of_the_floats():
    weights = Weights(torch.tensor([1.0, 2.0]), torch.empty(0, dtype=torch.int64))
    assert weights.sha256() == hashlib.sha256(struct.pack("<2f", 1, 2)).hexdigest() == sha256(weights.flat.numpy())


def test_the_hash_does_not_depend_on_the_byte_order_or_the_strides_in_memory():
    array = np.arange(6, dtype="<f4")
    spaced = np.zeros(12, dtype="<f4")
    spaced[::2] = array
    assert sha256(array.astype(">f4")) == sha256(array) == sha256(spaced[::2])
    assert re.fullmatch("[0-9a-f]{64}", sha256(array))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(0, 4 * 32 - 1))
def test_every_bit_of_the_floats_counts(bit):
    flipped = HAND_MADE.flat.numpy().copy()
    flipped.view(np.uint8)[bit // 8] ^= 1 << bit % 8
    assert Weights(torch.from_numpy(flipped), HAND_MADE.integers).sha256() != HAND_MADE.sha256()


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(0, 2 * 64 - 1))
def test_every_bit_of_the_integers_counts(bit):
    flipped = HAND_MADE.integers.numpy().copy()
    flipped.view(np.uint8)[bit // 8] ^= 1 << bit % 8
    assert Weights(HAND_MADE.flat, torch.from_numpy(flipped)).sha256() != HAND_MADE.sha256()


# ---------------------------------------------------------------- norms and angles


def test_l2_norm():
    assert l2_norm(torch.tensor([3.0, 4.0])) == 5.0
    assert l2_norm(torch.zeros(3)) == 0.0
    assert l2_norm(torch.tensor([2.0], dtype=torch.float64)) == 2.0


def test_l2_norm_is_accumulated_in_float64():
    assert l2_norm(torch.tensor([1e30, 1e30])) == pytest.approx(math.sqrt(2) * 1e30, rel=1e-7)  # 1e60 is no float32
    assert l2_norm(torch.tensor([3e-30, 4e-30])) == pytest.approx(5e-30, rel=1e-6)
    many = torch.full((1_000_000,), 0.1)
    assert l2_norm(many) == pytest.approx(1000 * float(np.float32(0.1)), rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_l2_norm_shows_what_is_not_finite(value):
    assert not math.isfinite(l2_norm(torch.tensor([1.0, value])))


def cosine(a, b):
    """Of one vector, beside others."""
    one, _, _, _, other = cosines(torch.stack([a, b.to(a.dtype), a, a, a]), [l2_norm(a)] * 5, b)
    assert one == other, "its place plays no part"
    return one


def test_cosine():
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.6, abs=1e-15)
    assert cosine(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])) == pytest.approx(1.0, abs=1e-15)
    assert cosine(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0])) == pytest.approx(-1.0, abs=1e-15)
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0])) == 0.0
    assert cosine(torch.tensor([1.0]), torch.tensor([2.0], dtype=torch.float64)) == 1.0


def test_cosine_with_zero_is_none():
    zero, one = torch.zeros(2), torch.ones(2)
    assert [cosine(zero, one), cosine(one, zero), cosine(zero, zero)] == [None, None, None]


vectors = hnp.arrays(np.float32, 8, elements=st.floats(-(2.0**60), 2.0**60, width=32))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(vectors, vectors, st.floats(1e-3, 1e3))
def test_cosine_is_within_bounds_symmetric_and_independent_of_length(a, b, factor):
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    angle = cosine(x, y)
    if angle is None:
        assert not (a.astype(np.float64) ** 2).sum() * (b.astype(np.float64) ** 2).sum()
        return
    assert -1 <= angle <= 1
    assert angle == cosine(y, x)
    assert cosine(x.double() * factor, y) == pytest.approx(angle, abs=1e-9)


def test_norms_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    x, y = torch.randn(2, 300_001, generator=torch.Generator().manual_seed(0))
    try:
        answers = set()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.add((l2_norm(x), l2_norm(y)))
    finally:
        torch.set_num_threads(threads)
    assert len(answers) == 1


def test_a_lazy_model_is_refused():
    with pytest.raises(ConfigError):
        Layout.of(build(lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), (1, 28, 28), 10, 0))


def test_float8_is_refused():
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn))
    with pytest.raises(ConfigError):
        Layout.of(module)


def test_the_cosine_of_an_infinite_vector_is_none():
    assert cosine(torch.tensor([math.inf, 1.0]), torch.tensor([-1.0, 0.0])) is None
