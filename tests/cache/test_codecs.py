"""What holds for every codec; values as they are; and codecs as a recipe writes them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.cache.codecs import CODECS, Codec, Raw, TopKCodec, parse_codec
from limbeck.core.errors import CacheError, ConfigError, TensorError

EVERY = [
    *(Raw(dtype) for dtype in ("float32", "float16", "bfloat16", "keep")),
    TopKCodec(k=4),
    TopKCodec(k=None, bits=8, temperature=1.0),
]


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True)) and first[3] == second[3]


@pytest.mark.parametrize("codec", EVERY, ids=str)
class TestEveryCodec:
    def test_its_layout_is_what_it_stores(self, codec):
        for kind in (torch.float32, torch.bfloat16):
            logits = torch.randn(6, 20).to(kind)
            arrays = codec.encode(logits)
            found = {name: (tuple(array.shape[1:]), array.dtype) for name, array in arrays.items()}
            assert found == codec.arrays([20], kind)
            assert all(array.shape[0] == 6 and array.is_contiguous() for array in arrays.values())
            assert sum(array.nbytes for array in arrays.values()) == 6 * codec.bytes_a_position([20], kind)

    def test_rows_stand_alone(self, codec):
        logits, rows = torch.randn(9, 20), torch.tensor([8, 0, 3, 3])
        arrays = codec.encode(logits)
        picked = codec.decode({name: array[rows] for name, array in arrays.items()}, [20], logits.dtype)
        assert same(picked, codec.decode(codec.encode(logits[rows]), [20], logits.dtype))

    def test_it_is_written_and_read(self, codec):
        assert parse_codec(codec.written()) == codec
        assert parse_codec(codec) is codec

    def test_the_originals_stay_and_have_no_gradient(self, codec):
        logits = torch.randn(5, 20, requires_grad=True)
        before = logits.detach().clone()
        decoded = codec.decode(codec.encode(logits), [20], logits.dtype)
        errors = codec.errors(logits, decoded)
        assert torch.equal(before, logits)
        parts = [decoded] if isinstance(decoded, torch.Tensor) else [decoded.log_probs, decoded.log_tail]
        assert not any(part.requires_grad for part in [*parts, *errors.values()])

    def test_errors_have_a_value_a_row(self, codec):
        logits = torch.randn(5, 20)
        decoded = codec.decode(codec.encode(logits), [20], logits.dtype)
        errors = codec.errors(logits, decoded, (1.0, 4.0))
        assert {"kl", "kl_t4"} <= set(errors)
        assert all(value.shape == (5,) and (value >= 0).all() for value in errors.values())

    def test_other_arrays_are_refused(self, codec):
        arrays = codec.encode(torch.randn(5, 20))
        with pytest.raises(CacheError, match=f"{codec.name}: these arrays are not those of {codec.name}"):
            codec.decode(arrays, [21], torch.float32)
        with pytest.raises(CacheError):
            codec.decode({}, [20], torch.float32)


@given(
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.bfloat16]),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 5),
)
def test_keep_keeps_anything(dtype, shape, rows):
    values = (100 * torch.rand(rows, *shape)).to(dtype)
    codec = Raw("keep")
    found = codec.decode(codec.encode(values), shape, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, values)
    assert codec.errors(values, found).get("relative", torch.zeros(0)).sum() == 0


@pytest.mark.parametrize(("dtype", "digits"), [("float32", 2**-24), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_relative_errors(dtype, digits):
    values = torch.randn(50, 4, 3, dtype=torch.float64)
    values[7] = 0.0
    codec = Raw(dtype)
    found = codec.decode(codec.encode(values), [4, 3], values.dtype)
    (name, errors), = codec.errors(values, found).items()  # fmt: skip
    wanted = [float((a - b).norm() / a.norm()) if a.any() else 0.0 for a, b in zip(values, found, strict=True)]
    assert name == "relative"
    torch.testing.assert_close(errors, torch.tensor(wanted, dtype=torch.float64))
    assert 0 < errors.max() <= digits
    assert errors[7] == 0


def test_infinite_and_missing_values_are_kept():
    values = torch.tensor([[1.0, math.inf], [math.nan, 2.0], [-math.inf, 3.0]])
    found = Raw("float16").decode(Raw("float16").encode(values), [2], torch.float32)
    assert torch.equal(found.nan_to_num(7.0), values.nan_to_num(7.0))
    assert Raw("float16").errors(values, found)["relative"].tolist() == [0.0, 0.0, 0.0]


def test_divergences_of_raw_logits():
    logits = 4 * torch.randn(30, 11)
    logits[:, 10] = -math.inf  # a padded vocabulary
    codec = Raw("bfloat16")
    found = codec.decode(codec.encode(logits), [11], logits.dtype)
    errors = codec.errors(logits, found, (1.0, 4.0))
    assert list(errors) == ["kl", "kl_t4"]
    for name, temperature in (("kl", 1.0), ("kl_t4", 4.0)):
        p, q = ((x[:, :10].double() / temperature).log_softmax(1) for x in (logits, found))
        torch.testing.assert_close(errors[name], (p.exp() * (p - q)).sum(1))
    assert 0 < errors["kl"].mean() < 1e-3


def test_what_half_precision_cannot_hold_is_refused():
    values = torch.zeros(5, 3)
    values[3, 1], values[1, 0] = -70_000.0, math.inf
    with pytest.raises(TensorError, match="position 3: too large for float16; found 70000; wanted at most 65504; .*bf"):
        Raw("float16").encode(values)
    assert Raw("bfloat16").encode(values)["values"].isfinite().sum() == 14
    with pytest.raises(TensorError, match="too large for float32; found 1e.300; .*"):
        Raw("float32").encode(torch.full((1, 1), 1e300, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_whole_numbers_are_only_kept(dtype):
    with pytest.raises(TensorError, match=f"values: .*found {dtype}; .*dtype: keep"):
        Raw("float16").encode(torch.ones(2, 2, dtype=dtype))


def test_names_and_options_as_a_recipe_writes_them():
    assert parse_codec("raw") == parse_codec({"raw": None}) == parse_codec({"raw": {}}) == Raw("float16")
    assert parse_codec({"top_k": {"k": None, "bits": 8}}) == TopKCodec(k=None, bits=8)
    assert all(isinstance(parse_codec(name), Codec) and CODECS[name].name == name for name in CODECS)
    assert TopKCodec(k=3).written() == {"top_k": {"k": 3, "bits": 6, "temperature": 4.0}}


@pytest.mark.parametrize(("spec", "message"), [
    ("topk", "store.logits: no such codec; found 'topk'; wanted one of raw, top_k; did you mean 'top_k'"),
    ("zip", "store.logits: no such codec; found 'zip'; wanted one of raw, top_k$"),
    ({"top_k": {"bit": 4}}, "store.logits.top_k.bit: no such option; wanted one of .*; did you mean 'bits'"),
    ({"top_k": {"bits": "many"}}, "store.logits.top_k.bits: .*integer.*; found 'many'"),
    ({"top_k": {"bits": 40}}, "top_k.bits: wrong option; found 40; wanted 2 to 12"),
    ({"raw": {"dtype": "float8"}}, "raw.dtype: wrong option; found 'float8'; wanted one of float32, float16, "),
    ({"raw": "float16"}, "store.logits: cannot be read"),
    ({"raw": {}, "top_k": {}}, "store.logits: cannot be read"),
    (7, "store.logits: cannot be read; found 7; wanted a name, or"),
])  # fmt: skip
def test_what_is_no_codec_is_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_codec(spec, where="store.logits")
