from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from limbeck.core.errors import ConfigError, DataError
from limbeck.core.hashing import below, draw_bits, key, key_tensor, uniform
from limbeck.data import (
    Augment,
    Cutmix,
    Cutout,
    Flip,
    Mixup,
    Normalisation,
    PadCrop,
    describe_augment,
    parse_augment,
    views,
)

CHAIN = ["pad_crop", "flip", {"cutout": {"size": 3}}, "mixup", {"cutmix": {"probability": 0.5}}]
COUNT = 4000


def words(seed: int, epoch: int, slot: int, transform, index: torch.Tensor) -> torch.Tensor:
    """The random words that the documentation promises to a transform."""
    return draw_bits(key_tensor([key(1, seed, epoch, slot, draw) for draw in range(transform.draws)]), index)


def one_hot_places(count: int, height: int, width: int) -> torch.Tensor:
    """Images whose every pixel holds its own number, so that a view shows where each pixel came from."""
    places = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, 1, height, width)
    return places.expand(count, 1, height, width)


@given(st.permutations(range(40)), st.integers(1, 40), st.integers(0, 3), st.integers(-2, 2))
@settings(max_examples=30)
def test_a_view_does_not_depend_on_its_batch(order, size, epoch, seed):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (40, 3, 6, 9), dtype=torch.uint8, generator=generator)
    whole = views(images, torch.arange(40), seed, epoch, transforms=CHAIN, normalise="imagenet")
    index = torch.tensor(order[:size])
    assert torch.equal(views(images, index, seed, epoch, transforms=CHAIN, normalise="imagenet"), whole[index])


def test_views_change_with_seed_epoch_index_and_slot(images):
    same = images[:1].expand(200, -1, -1, -1)
    index = torch.arange(200)

    def view(seed=0, epoch=0, chain=None):
        return views(same, index, seed, epoch, transforms=chain or [PadCrop(2)])

    assert len(view().flatten(1).unique(dim=0)) == 25
    for other in (view(seed=1), view(epoch=1), view(chain=[Flip(0.0), PadCrop(2)])):
        assert 0.7 < (other != view()).flatten(1).any(1).float().mean() < 1
    assert torch.equal(view(), view())


def test_geometry_matches_a_reference_written_for_one_sample(images):
    chain = (PadCrop(2), Flip(), PadCrop(3), Flip(0.3))
    index = torch.arange(40)
    drawn = [words(7, 2, slot, t, index) for slot, t in enumerate(chain)]
    for sample, view in enumerate(views(images, index, 7, 2, transforms=chain)):
        image = images[sample]
        for bits, transform in zip(drawn, chain, strict=True):
            if isinstance(transform, PadCrop):
                top, left = (int(below(b, 2 * transform.padding + 1)) for b in bits[sample])
                padded = F.pad(image, (transform.padding,) * 4)
                image = padded[:, top : top + 6, left : left + 9]
            elif float(uniform(bits[sample, 0])) < transform.probability:
                image = torch.flip(image, (2,))
        assert torch.equal(view, Normalisation()(image[None])[0])


def test_crop_offsets_and_flips_are_fair():
    places = one_hot_places(COUNT, 5, 5)
    crops = views(places, torch.arange(COUNT), 0, 0, transforms=[PadCrop(2)])
    centre = crops[:, 0, 2, 2]  # which pixel came to the middle tells the offset
    counts = torch.stack([(centre == number).sum() for number in range(1, 26)])
    assert int(counts.sum()) == COUNT
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    flipped = views(places, torch.arange(COUNT), 0, 0, transforms=[Flip(0.25)])[:, 0, 0, 0] == 5
    assert stats.binomtest(int(flipped.sum()), COUNT, 0.25).pvalue > 1e-4


def test_flip_always_and_never(images):
    index = torch.arange(40)
    plain = views(images, index, 0, 0)
    assert torch.equal(views(images, index, 0, 0, transforms=[Flip(1.0)]), plain.flip(-1))
    assert torch.equal(views(images, index, 0, 0, transforms=[Flip(0.0), PadCrop(0)]), plain)


def test_cutout_removes_a_square_around_a_fair_centre():
    ones = torch.ones(COUNT, 2, 7, 8)
    view = views(ones, torch.arange(COUNT), 0, 0, transforms=[Cutout(3)])
    assert torch.equal(view[:, 0], view[:, 1])
    hole = view[:, 0] == 0
    tall, wide = hole.any(2).sum(1), hole.any(1).sum(1)
    assert torch.equal(hole.sum((1, 2)), tall * wide)
    assert set(tall.tolist()) == set(wide.tolist()) == {2, 3}
    whole = (tall == 3) & (wide == 3)
    assert abs(whole.float().mean() - 5 / 7 * 6 / 8) < 5 * 0.5 / COUNT**0.5
    top = hole.any(2).float().argmax(1)[whole]
    assert stats.chisquare(top.bincount().numpy()).pvalue > 1e-4


def test_cutout_fills_with_the_mean_and_padding_is_black():
    white = torch.full((50, 3, 8, 8), 255, dtype=torch.uint8)
    stats_ = Normalisation((0.5, 0.25, 0.125), (0.5, 0.5, 0.5))
    cut = views(white, torch.arange(50), 0, 0, transforms=[Cutout(20)], normalise=stats_)
    assert (cut[:, :, 4, 4] == 0).all()
    padded = views(white, torch.arange(50), 0, 0, transforms=[PadCrop(4)], normalise=stats_)
    assert torch.equal(padded.amin((0, 2, 3)), torch.tensor([-1.0, -0.5, -0.25]))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_mixup_lambda_has_its_distribution(alpha):
    """Sample i is the number 1 at pixel i, so that its own share and its partner can be read off the view."""
    images = torch.eye(COUNT).view(COUNT, 1, 1, COUNT)
    view = views(images, torch.arange(COUNT), 0, 0, transforms=[Mixup(alpha)]).flatten(1)
    own = view.diagonal().clone()
    partner = (view - torch.diag(own)).argmax(1)
    lonely = view.sum(1) - own == 0
    kept = own[~lonely].double().numpy()
    # shares that round to 1 leave no trace of a partner; compare where both can be seen
    assert stats.kstest(kept, stats.beta(alpha, alpha).cdf).statistic < 2 / COUNT**0.5 + 1.1 * float(
        lonely.float().mean()
    )
    assert torch.allclose(view.sum(1), torch.ones(COUNT))
    assert len(partner[~lonely].unique()) > 0.45 * COUNT  # any sample of the set, not of a batch
    assert stats.kstest(partner[~lonely].numpy() / COUNT, "uniform").pvalue > 1e-4


def test_beta_table_against_the_distribution():
    from limbeck.data.mixing import beta

    bits = draw_bits(key_tensor([5]), torch.arange(100_000)).flatten()
    for alpha in (0.1, 0.4, 1.0, 3.0):
        drawn = beta(bits, alpha).double().numpy()
        assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).statistic < 0.006 + 0.2 * (alpha < 0.2)
        assert abs(drawn.mean() - 0.5) < 0.01
        assert abs(drawn.var() - stats.beta(alpha, alpha).var()) < 0.003


def test_mixing_probability_is_kept(images):
    plain = views(images, torch.arange(40), 0, 0)
    changed = 0
    for epoch in range(20):
        for transform in (Mixup(1.0, probability=0.25), Cutmix(1.0, probability=0.25)):
            view = views(images, torch.arange(40), 0, epoch, transforms=[transform])
            changed += int((view != plain).flatten(1).any(1).sum())
    assert 0.15 < changed / 1600 < 0.26  # tiny boxes and partners that are the sample itself change nothing


def test_cutmix_pastes_what_the_labels_say():
    """Pixels hold their sample's number: the share kept is counted, and must be the labels' share."""
    count, height, width = 500, 12, 16
    images = torch.arange(count, dtype=torch.float32).view(count, 1, 1, 1).expand(count, 1, height, width).contiguous()
    augment = Augment([Cutmix()], samples=count, classes=count, seed=3)
    index = torch.arange(count)
    rows = augment.reads(index, 4)
    view, soft = augment(images[rows.flatten()], rows, 4, rows.flatten())
    own = view[:, 0] == index.view(-1, 1, 1)
    partner = rows[1]
    assert torch.equal(torch.where(own, index.view(-1, 1, 1), partner.view(-1, 1, 1)), view[:, 0].long())
    other = partner != index
    share = own.float().mean((1, 2))
    assert torch.allclose(soft[index, index][other], share[other], atol=1e-6)
    assert torch.allclose(soft[index, partner][other], 1 - share[other], atol=1e-6)
    box = ~own
    assert torch.equal(box.sum((1, 2)), box.any(2).sum(1) * box.any(1).sum(1))  # a rectangle
    assert 0.5 < float(share[other].mean()) < 0.75  # half for alpha 1, and what the border cuts off


def test_cutmix_area_before_the_border_is_one_minus_lambda():
    from limbeck.data.mixing import beta

    transform, size = Cutmix(0.7), 64
    index = torch.arange(2000)
    bits = words(0, 0, 0, transform, index)
    bits[:, 3:] = -(1 << 63)  # without its sign the middle: half of 2**64 is half of every range
    images, partners = torch.zeros(2000, 1, size, size), torch.ones(2000, 1, size, size)
    mixed, share = transform(images, partners, bits)
    wanted = 1 - beta(bits[:, 2], 0.7)
    assert torch.allclose(mixed.mean((1, 2, 3)), 1 - share, atol=1e-6)
    assert (wanted - mixed.mean((1, 2, 3))).abs().max() < 2 / size
    assert stats.kstest(mixed.mean((1, 2, 3)).numpy(), stats.beta(0.7, 0.7).cdf).statistic < 0.09


@given(st.integers(0, 5), st.integers(0, 5))
def test_soft_labels_follow_the_images(seed, epoch):
    """Images are their own one-hot labels, so that any mixture of images is the mixture of labels."""
    classes = 6
    labels = torch.arange(30) % classes
    images = F.one_hot(labels, classes).float().view(30, classes, 1, 1).expand(30, classes, 4, 4)
    augment = Augment(["mixup", "cutmix"], samples=30, classes=classes, seed=seed)
    index = torch.arange(30)
    rows = augment.reads(index, epoch)
    assert rows.shape == (4, 30)
    view, soft = augment(images[rows.flatten()], rows, epoch, labels[rows.flatten()])
    assert torch.allclose(soft.sum(1), torch.ones(30), atol=1e-6)
    assert torch.allclose(view.mean((2, 3)), soft, atol=1e-6)
    again, same = augment(images[rows.flatten()], rows, epoch, F.one_hot(labels, classes).float()[rows.flatten()])
    assert torch.equal(again, view)
    assert torch.equal(same, soft)


def test_partner_is_mixed_in_the_view_it_has_itself(images):
    chain = ["pad_crop", "flip"]
    augment = Augment([*chain, Mixup(1.0)], samples=40, seed=5)
    index = torch.arange(40)
    rows = augment.reads(index, 1)
    single = views(images, index, 5, 1, transforms=chain)
    share = _share(words(5, 1, 2, Mixup(1.0), index))
    expected = single * share + single[rows[1]] * (1 - share)
    assert torch.equal(views(images, index, 5, 1, transforms=[*chain, Mixup(1.0)]), expected)


def _share(bits: torch.Tensor) -> torch.Tensor:
    from limbeck.data.mixing import beta

    return beta(bits[:, 2], 1.0).view(-1, 1, 1, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_views(images):
    index = torch.arange(40)
    here = views(images, index, 3, 1, transforms=CHAIN, normalise="imagenet")
    there = views(images.cuda(), index, 3, 1, transforms=CHAIN, normalise="imagenet")
    assert torch.equal(there.cpu(), here)


def test_parse_reads_names_options_and_transforms():
    chain = parse_augment(["pad_crop", {"cutout": {"size": 8}}, {"flip": None}, Mixup(0.4)])
    assert chain == (PadCrop(4), Cutout(8), Flip(0.5), Mixup(0.4))
    assert parse_augment(describe_augment(chain)) == chain
    assert parse_augment(None) == ()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flip", r"augment: must be a list; found 'flip'; write \['flip'\]"),
        (["mixupp"], r"augment\[0\]: .* did you mean 'mixup'"),
        (["flip", {"pad_crop": {"paddding": 4}}], r"augment\[1\].pad_crop: no such option; .* did you mean 'padding'"),
        ([{"flip": {"probability": 1.5}}], "augment.flip.probability: .* found 1.5; wanted a number .* at most 1"),
        ([{"pad_crop": {"padding": "4"}}], "augment.pad_crop.padding: .* found '4'; wanted a whole number"),
        ([{"pad_crop": {"padding": True}}], "augment.pad_crop.padding"),
        ([{"cutout": {"size": 0}}], "augment.cutout.size"),
        ([{"mixup": {"alpha": 0}}], "augment.mixup.alpha: .* above 0"),
        ([{"cutmix": {"alpha": float("nan")}}], "augment.cutmix.alpha"),
        ([{"flip": 3}], r"augment\[0\]: cannot be read"),
        ([{"flip": {}, "mixup": {}}], r"augment\[0\]: cannot be read"),
        ([3], r"augment\[0\]: cannot be read; found 3"),
    ],
)
def test_wrong_chains_are_told(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_augment(spec)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["flip", "mixup"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["flip", "cutout", "size", "alpha", "x"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@given(json_like)
def test_parse_reads_or_refuses_anything(spec):
    try:
        chain = parse_augment(spec)
    except ConfigError:
        return
    assert parse_augment(describe_augment(chain)) == chain


def test_what_cannot_be_augmented_is_told(images, labels):
    with pytest.raises(DataError, match="only images"):
        Augment(["flip"]).check(torch.zeros(4, 3))
    with pytest.raises(DataError, match="known size"):
        Augment(["mixup"])
    with pytest.raises(DataError, match="a class for every sample"):
        Augment(["mixup"], samples=40, classes=5).check(images, labels - 1)
    with pytest.raises(DataError, match="found 3 channels; wanted 1"):
        Augment(normalise="imagenet").check(torch.zeros(2, 1, 4, 4))
