"""CAE-DFKD: codes of classes and the noise around them, what a round makes of which class, and the contrast."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, ModelError
from limbeck.objectives import KD
from limbeck.schemes import build
from limbeck.schemes.data_free.cae_dfkd import NamedPool
from limbeck.schemes.data_free.class_codes import diffused, orthogonal_codes, text_codes
from limbeck.schemes.data_free.contrast import supervised_contrast
from tests.schemes.data_free.scene import STATS, cast, images, same, trained

SMALL = {"latent": 8, "width": 8, "size": 12, "every": 2, "iterations": 20, "lr": 0.01, "head": 6}


def naming(whole=None, **options):
    (training,) = build("cae_dfkd", **{**SMALL, **options}).trainings(whole or cast())
    return training.stages[0].distiller.setup(training.train.example()), training.train.example(12).inputs


def test_noise_is_of_four_kinds_as_wide_as_the_code_is_long():
    torch.manual_seed(0)
    codes = orthogonal_codes(3, 400)[torch.arange(1200) % 3]
    assert torch.equal(diffused(codes, torch.zeros(1200)), codes)
    found = diffused(codes, torch.full((1200,), 0.5))
    noise = (found - codes) * 20 / 0.5  # in units of its deviation
    for kind in range(4):
        rows = noise[kind::4]
        assert rows.mean().abs() < 0.02
        assert rows.std().item() == pytest.approx(1, abs=0.02)
    fourth = [((noise[k::4]) ** 4).mean().item() for k in range(4)]
    assert fourth == pytest.approx([3.0, 1.8, 6.0, 6.0], rel=0.06)  # kurtosis tells them apart
    assert (noise[3::4] == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    nearest = (found @ orthogonal_codes_of(codes).T).argmax(1)
    assert torch.equal(nearest, torch.arange(1200) % 3)
    only = diffused(codes, torch.full((1200,), 0.5), sources=1)
    assert ((only - codes) == 0).float().mean() < 0.01


def orthogonal_codes_of(codes):
    return codes[:3]


def test_a_round_makes_what_the_teacher_takes_for_each_class():
    torch.manual_seed(0)
    distiller, like = naming(adversarial=0.0, statistics=1.0, one_hot=2.0)
    losses, whole = [], distiller.round_loss

    def noted(images, targets):
        losses.append(float((found := whole(images, targets)).detach()))
        return found

    distiller.round_loss = noted
    images, extras = distiller.make(like)
    assert len(losses) == 20
    assert min(losses[-5:]) < 0.8 * losses[0]
    assert distiller.pool.size == 12
    assert torch.equal(distiller.pool.classes[:12], torch.arange(12) % 3)
    kept = distiller.pool.normalise(distiller.pool.kept)
    for image, label in zip(images, extras["classes"], strict=True):
        assert any(torch.equal(image, kept[i]) for i in range(12) if distiller.pool.classes[i] == label)


def test_the_generator_goes_on_and_begins_anew_after_its_life():
    distiller, like = naming(life=2, iterations=1)
    begun = []
    begin = distiller.maker.begin
    distiller.maker.begin = lambda anew: begun.append(anew) or begin(anew)
    for _ in range(7):
        distiller.make(like)
        distiller.moves += 1
    assert begun == [True, False, True, False]


def test_classes_stay_with_their_inputs_in_a_full_ring():
    pool = NamedPool(5, (1,), None)
    for start in (0, 3, 6):
        values = torch.arange(start, start + 3)
        pool.add_named(values.view(3, 1).float(), values)
    found, classes = pool.draw_named(50)
    assert torch.equal(found[:, 0].long(), classes)
    assert set(classes.tolist()) == {4, 5, 6, 7, 8}
    images = NamedPool(2, (1, 2, 2), STATS)
    images.add_named(torch.zeros(2, 1, 2, 2), torch.tensor([1, 1]))
    assert images.draw_named(3)[0].abs().max() < 0.01


def test_the_students_loss_is_the_recipes_and_the_contrast_of_its_features():
    whole = cast()
    distiller, like = naming(whole, contrast=0.7)
    batch = distiller.made(next(iter(distiller_batches(whole))))
    distiller.student.eval()
    found = distiller(batch)
    plain = Distiller(whole.student, KD(temperature=2.0), whole.teacher.model).setup(batch)
    feature = whole.student[:-1](batch.inputs)
    value = supervised_contrast(distiller.head(feature), batch.extras["classes"], 0.1)
    torch.testing.assert_close(found.total, plain(batch).total + 0.7 * value)
    assert value > 0
    assert len(like) == 12


def distiller_batches(whole):
    (training,) = build("cae_dfkd", **SMALL).trainings(whole)
    return training.train.batches()


def test_who_learns_when():
    distiller, like = naming()
    made = {id(p) for p in distiller.maker.parameters()}
    learned = {id(p) for p in distiller.parameters_of("student")}
    assert not made & learned
    assert {id(p) for p in (*distiller.student.parameters(), *distiller.head.parameters())} <= learned
    before = [p.clone() for p in distiller.student.parameters()]
    distiller.make(like)
    assert all(torch.equal(a, b) for a, b in zip(before, distiller.student.parameters(), strict=True))
    assert all(p.grad is None for p in distiller.student.parameters())


def test_without_contrast_other_heads_change_nothing_and_no_real_image_is_read():
    options = {**SMALL, "iterations": 2, "every": 4, "width": 4}
    first = trained(build("cae_dfkd", **options), cast())
    second = trained(build("cae_dfkd", **options), cast(images(poison=True)))
    assert same(first, second)
    assert all(t.isfinite().all() for t in first.values() if t.is_floating_point())
    assert not same(first, trained(build("cae_dfkd", **{**options, "contrast": 0.0}), cast()))


def test_a_text_encoder_gives_the_codes(tmp_path):
    """A CLIP of a few weights: the codes are what it says of the prompts, and the names tell them apart."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<unk>", "<end>", "a", "photo", "of", "cat", "dog", "0", "1"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    post = tokenizers.processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 2)])
    raw.post_processor = post
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>")
    tokenizer.save_pretrained(tmp_path)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = {**small, "vocab_size": 10, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {**small, "image_size": 8, "patch_size": 4}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    clip.eval().save_pretrained(tmp_path)
    found = text_codes(["cat", "dog"], str(tmp_path))
    ids = torch.tensor([[3, 4, 5, 3, 6, 2], [3, 4, 5, 3, 7, 2]])
    with torch.no_grad():
        wanted = clip.text_projection(clip.text_model(ids).pooler_output)
    torch.testing.assert_close(found, F.normalize(wanted, dim=1))
    assert (found[0] - found[1]).abs().max() > 1e-3
    whole = cast()
    whole.train.class_names = ("cat", "dog", "cat")
    distiller, _ = naming(whole, text=str(tmp_path))
    torch.testing.assert_close(distiller.codes, found[[0, 1, 0]])
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip"


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"scheme.sources"):
        build("cae_dfkd", sources=5)
    with pytest.raises(ModelError):
        text_codes(["cat"], str(tmp_path))
