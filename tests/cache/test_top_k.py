"""Sparse predictions: what comes back, at which error, and the same bytes every time."""

import io
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from limbeck.cache.codecs import TopKCodec
from limbeck.core.errors import CacheError, ConfigError, TensorError
from limbeck.core.top_k import TopK
from limbeck.data import normalisation
from limbeck.models import load_model

MINUS = -math.inf


def round_trip(codec: TopKCodec, logits: torch.Tensor) -> TopK:
    return codec.decode(codec.encode(logits), logits.shape[1:], logits.dtype)


def definition(logits: torch.Tensor, top: TopK, temperature: float) -> list[float]:
    """KL(original || decoded, its tail spread evenly) of each row, class by class, in float64."""
    found = []
    for row, dense in zip(logits.double(), top.dense().double(), strict=True):
        p, q = (row / temperature).softmax(0), (dense / temperature).softmax(0)
        found.append(sum(float(a) * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
    return found


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    """Logits ``[897, 10]`` of a classifier of digits for images that it has not seen."""
    data = load_digits()
    model = LogisticRegression(max_iter=300).fit(data.data[:900] / 16, data.target[:900])
    assert model.score(data.data[900:] / 16, data.target[900:]) > 0.88
    return torch.from_numpy(model.decision_function(data.data[900:] / 16)).float() * 3  # as sharp as a net's


def test_ids_tail_and_probabilities(real):
    top, wanted = round_trip(TopKCodec(k=4, bits=8), real), TopK.of(real.double(), 4)
    assert torch.equal(top.ids, wanted.ids)
    assert top.classes == 10
    torch.testing.assert_close(top.log_probs.double(), wanted.log_probs, atol=0.2, rtol=0)  # far below the largest
    torch.testing.assert_close(top.log_probs.double().exp(), wanted.log_probs.exp(), atol=0.005, rtol=0)
    torch.testing.assert_close(top.log_tail.double(), wanted.log_tail, atol=0.01, rtol=0)
    torch.testing.assert_close(top.dense().exp().sum(1), torch.ones(len(real)))
    total = top.log_probs.double().exp().sum(1) + top.log_tail.double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [1, 3, 9, 10])
def test_errors_are_those_of_the_definition(real, k):
    logits, codec = real[:60], TopKCodec(k=k, bits=5)
    top = round_trip(codec, logits)
    errors = codec.errors(logits, top, (1.0, 2.5, 4.0))
    assert list(errors) == ["kl_kept", "kl", "kl_t2.5", "kl_t4"]
    for name, temperature in (("kl", 1.0), ("kl_t2.5", 2.5), ("kl_t4", 4.0)):
        wanted = torch.tensor(definition(logits, top, temperature), dtype=torch.float64)
        torch.testing.assert_close(errors[name], wanted, atol=1e-6, rtol=1e-4)
    p, q = TopK.at(logits.double(), top.ids), top
    kept = (p.log_probs.exp() * (p.log_probs - q.log_probs)).sum(1)
    tail = p.log_tail.exp() * (p.log_tail - q.log_tail) if k < 10 else 0.0
    torch.testing.assert_close(errors["kl_kept"], kept + tail, atol=1e-6, rtol=1e-3)
    assert set(codec.errors(logits, top)) == {"kl_kept", "kl", "kl_t4"}
    assert (errors["kl"] >= errors["kl_kept"]).all()


def test_four_times_less_error_with_every_bit(real):
    means = {}
    for bits in range(2, 13):
        codec = TopKCodec(k=None, bits=bits)
        means[bits] = float(codec.errors(real, round_trip(codec, real))["kl"].mean())
    assert all(means[b + 1] < means[b] for b in range(2, 12))
    assert all(2.5 < means[b] / means[b + 1] < 6.5 for b in range(3, 9)), means
    assert means[8] < 1e-5


@pytest.mark.parametrize(("codec", "kl", "kl_t4"), [
    (TopKCodec(k=None, bits=8), 2e-5, 2e-5),
    (TopKCodec(k=None, bits=6), 2e-4, 2e-4),
    (TopKCodec(k=None, bits=6, temperature=1.0), 1e-4, 0.1),
])  # fmt: skip
def test_bounds_on_real_logits(real, codec, kl, kl_t4):
    errors = codec.errors(real, round_trip(codec, real))
    assert errors["kl"].mean() < kl
    assert errors["kl_t4"].mean() < kl_t4
    assert codec.bytes_a_position([10]) <= 12


def test_levels_are_best_at_their_temperature(real):
    means = {
        levels: codec.errors(real, round_trip(codec, real))
        for levels in (1.0, 4.0)
        for codec in [TopKCodec(k=None, bits=5, temperature=levels)]
    }
    assert means[1.0]["kl"].mean() < means[4.0]["kl"].mean()
    assert means[4.0]["kl_t4"].mean() < means[1.0]["kl_t4"].mean()


def test_bounds_on_a_teacher_of_cifar(shared_data):
    weights = shared_data / "teachers" / "cifar10_resnet20.safetensors"
    teacher = load_model("resnet20_a", num_classes=10, weights=weights).eval()
    rows = pq.ParquetFile(shared_data / "cifar10" / "test.parquet").iter_batches(32, columns=["image"])
    files = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in next(rows).to_pylist()]
    images = torch.stack([torch.from_numpy(np.array(file.convert("RGB"))) for file in files]).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = teacher(normalisation("imagenet")(images))
    assert logits.softmax(1).amax(1).median() > 0.9
    for codec, most in ((TopKCodec(k=None, bits=8), 1e-4), (TopKCodec(k=None, bits=6), 1e-3)):
        errors = codec.errors(logits, round_trip(codec, logits))
        assert errors["kl"].max() < most
        assert errors["kl_t4"].max() < most


@pytest.mark.parametrize(("classes", "options", "most"), [
    (32_000, {}, 115), (128_256, {}, 125), (152_000, {}, 130), (2, {"k": None, "bits": 8}, 4),
    (10, {"k": None, "bits": 8}, 12), (100, {"k": None, "bits": 5}, 65), (1000, {"k": 35, "bits": 6}, 75),
])  # fmt: skip
def test_bytes(classes, options, most):
    codec = TopKCodec(**options)
    arrays = codec.encode(torch.randn(3, classes))
    assert sum(array.nbytes for array in arrays.values()) == 3 * codec.bytes_a_position([classes])
    assert codec.bytes_a_position([classes]) <= most


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("classes", "rows", "k"), [(40_000, 5, 50), (1000, 12, 30), (11, 40, 7), (7, 30, None)])
def test_a_rows_bytes_do_not_depend_on_its_batch(classes, rows, k, kind, threads):
    codec = TopKCodec(k=k)
    logits = (3 * torch.randn(rows, classes)).to(kind)  # in half precision many are equal
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = codec.encode(logits)
        single = [codec.encode(logits[i : i + 1]) for i in range(rows)]
        spread = codec.encode(logits.t().contiguous().t())  # other strides
        turned = codec.encode(logits.flip(0)[:, :])
    finally:
        torch.set_num_threads(before)
    for name, array in whole.items():
        assert torch.equal(torch.cat([one[name] for one in single]), array)
        assert torch.equal(spread[name], array)
        assert torch.equal(turned[name].flip(0), array)


def test_more_rows_than_are_worked_on_at_a_time():
    codec, logits = TopKCodec(k=3), torch.randn(45, 100_000)  # several pieces, the last of one row or so
    whole = codec.encode(logits)
    for start, stop in ((0, 20), (20, 41), (41, 45)):
        part = codec.encode(logits[start:stop])
        assert all(torch.equal(part[name], whole[name][start:stop]) for name in whole)
    assert torch.equal(codec.decode(whole, [100_000], logits.dtype).ids, logits.topk(3).indices.sort(1).values)
    assert codec.errors(logits, codec.decode(whole, [100_000], logits.dtype))["kl_kept"].shape == (45,)
    logits[44, 3] = math.nan
    with pytest.raises(TensorError, match="position 44"):
        codec.encode(logits)


def test_any_rows_are_decoded():
    codec, logits = TopKCodec(k=5), torch.randn(20, 60)
    arrays = codec.encode(logits)
    whole, rows = codec.decode(arrays, [60], logits.dtype), torch.tensor([7, 3, 3, 19])
    some = codec.decode({name: array[rows] for name, array in arrays.items()}, [60], logits.dtype)
    for part, of in zip(some[:3], whole[:3], strict=True):
        assert torch.equal(part, of[rows])
    none = codec.decode({name: array[:0] for name, array in arrays.items()}, [60], logits.dtype)
    assert none.ids.shape == (0, 5)
    assert {n: a.shape[0] for n, a in codec.encode(logits[:0]).items()} == dict.fromkeys(arrays, 0)


@given(
    st.sampled_from([2, 3, 17, 64]),
    st.integers(2, 12),
    st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    st.integers(0, 3),
    st.booleans(),
    st.data(),
)
@settings(max_examples=50)
def test_any_finite_logits(classes, bits, size, distinct, padded, data):
    k = data.draw(st.integers(1, classes))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = size * torch.randn(6, classes, generator=generator)
    if distinct:  # few values, many ties
        logits = size * torch.randint(-distinct, distinct + 1, (6, classes), generator=generator).float()
    if padded:
        logits[:, classes // 2 + 1 :] = MINUS
    codec = TopKCodec(k=k, bits=bits)
    top = round_trip(codec, logits)
    for row, ids, log_probs in zip(logits, top.ids, top.log_probs, strict=True):
        assert ids.tolist() == sorted(sorted(range(classes), key=lambda c: (-float(row[c]), c))[:k])
        assert ((log_probs == MINUS) == (row[ids] == MINUS)).all()
        assert log_probs.argmax() == row[ids].argmax() or log_probs.max() == log_probs[row[ids].argmax()]
    dense = top.dense()
    assert not dense.isnan().any()
    torch.testing.assert_close(dense.exp().sum(1), torch.ones(6))
    errors = codec.errors(logits, top)
    for name, values in errors.items():
        assert values.isfinite().all(), name
        assert (values >= 0).all()


def test_one_hot_rows():
    for rest in (MINUS, -1e4):
        logits = torch.full((3, 12), rest)
        logits[range(3), [0, 5, 11]] = 0.0
        for k in (1, 4, 12):
            top = round_trip(TopKCodec(k=k), logits)
            assert torch.equal(top.dense().exp(), logits.exp())
            assert TopKCodec(k=k).errors(logits, top)["kl"].max() == 0


@pytest.mark.parametrize("k", [1, 3, 8])
def test_constant_rows(k):
    logits = torch.full((2, 8), -1234.5)
    top = round_trip(TopKCodec(k=k), logits)
    assert top.ids.tolist() == [list(range(k))] * 2
    torch.testing.assert_close(top.dense(), torch.full((2, 8), -math.log(8)), atol=2e-3, rtol=0)


def test_a_huge_vocabulary():
    classes = 1 << 18
    logits = torch.zeros(2, classes)
    logits[0, [0, 77_777, classes - 1]] = torch.tensor([9.0, 14.0, 11.0])
    for k in (1, 3, 50):
        top = round_trip(TopKCodec(k=k), logits)
        assert set(top.ids[0].tolist()) >= ({77_777} if k == 1 else {0, 77_777, classes - 1})
        assert top.ids[1].tolist() == list(range(k))
        assert TopKCodec(k=k).errors(logits, top)["kl_kept"].max() < 1e-4
        torch.testing.assert_close(top.dense().double().exp().sum(1), torch.ones(2).double(), atol=1e-3, rtol=0)


def test_the_type_of_what_comes_back():
    for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        top = round_trip(TopKCodec(k=2), torch.randn(3, 5).to(kind))
        wanted = torch.float64 if kind == torch.float64 else torch.float32
        assert top.log_probs.dtype == top.log_tail.dtype == wanted
        assert top.ids.dtype == torch.int64


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_logit_is_refused_with_its_place(value):
    logits = torch.zeros(4, 6)
    logits[2, 3] = value
    logits[0, 0] = MINUS
    with pytest.raises(TensorError, match=f"position 2: a logit is NaN or infinite; found class 3: {value}"):
        TopKCodec(k=2).encode(logits)


def test_a_row_that_rules_all_out_is_refused():
    logits = torch.zeros(4, 6)
    logits[1] = MINUS
    with pytest.raises(TensorError, match="position 1: every logit is minus infinity"):
        TopKCodec(k=2).encode(logits)


@pytest.mark.parametrize("values", [torch.zeros(3, 4, 5), torch.zeros(3), torch.zeros(3, 5, dtype=torch.int64)])
def test_only_logits_are_stored(values):
    with pytest.raises(TensorError, match="values: "):
        TopKCodec(k=2).encode(values)


def test_wrong_options():
    for options, message in (
        ({"k": 0}, "top_k.k: wrong option; found 0"),
        ({"bits": 1}, "top_k.bits: wrong option; found 1; wanted 2 to 12"),
        ({"bits": 13}, "top_k.bits"),
        ({"temperature": 0.0}, "top_k.temperature: must be above zero"),
        ({"temperature": math.inf}, "top_k.temperature"),
    ):
        with pytest.raises(ConfigError, match=message):
            TopKCodec(**options)
    with pytest.raises(ConfigError, match="top_k.k: more classes.*found 50; wanted at most 10; null keeps them all"):
        TopKCodec().encode(torch.zeros(2, 10))


@pytest.mark.parametrize("damage", ["missing", "more", "shape", "type", "rows", "k", "bits"])
def test_other_arrays_are_refused(damage):
    codec, logits = TopKCodec(k=5), torch.randn(4, 90)
    arrays = codec.encode(logits)
    if damage == "missing":
        del arrays["tail"]
    elif damage == "more":
        arrays["head"] = arrays["tail"]
    elif damage == "shape":
        arrays["ids"] = arrays["ids"][:, 1:]
    elif damage == "type":
        arrays["widest"] = arrays["widest"].bfloat16()
    elif damage == "rows":
        arrays["levels"] = arrays["levels"][1:]
    else:
        codec = TopKCodec(k=7) if damage == "k" else TopKCodec(k=5, bits=9)
    with pytest.raises(CacheError, match="top_k: these arrays are not those of top_k; found .*; wanted "):
        codec.decode(arrays, [90], logits.dtype)


def test_ids_that_are_no_set_are_refused():
    codec, logits = TopKCodec(k=5), torch.randn(4, 90)
    arrays = codec.encode(logits)
    arrays["ids"][2] = 255
    with pytest.raises(CacheError, match="ids: these bytes are no set of ids"):
        codec.decode(arrays, [90], logits.dtype)
