"""G2SD: what both models see, what the student learns of it, what goes on into the task, and what ships."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.build import as_loader
from limbeck.data.sources.load import load_source
from limbeck.engine import TrainConfig, fit
from limbeck.models.vit import ViT
from limbeck.objectives import KD, CrossEntropy
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.in_steps.generic import Encoder, generic_loss
from limbeck.schemes.parts.masked_patches import PatchDecoder, patch_order, sincos_positions
from tests.schemes.in_steps.vits import autoencoder, student

BOTH = "DeiTForImageClassificationWithTeacher"
SMALL = {"teacher_blocks": 2, "decoder_width": 8, "decoder_blocks": 1, "decoder_heads": 2}


def batch(size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(size, 1, 8, 8, generator=generator)
    return Batch(images, torch.arange(size) % 3, torch.arange(size))


def cast(model: nn.Module | None = None, tuned: bool = True, **more: Any) -> Cast:
    teachers = {"mae": FrozenTeacher(more.pop("mae", None) or autoencoder())}
    if tuned:
        teachers = {"teacher": FrozenTeacher(student("ViTForImageClassification", seed=5)), **teachers}
    train = as_loader((batch(12).inputs, batch(12).labels), batch_size=4)
    config = TrainConfig(steps=4, optimizer="sgd", lr=0.1, compile="off", device="cpu")
    settings = {"loss": Terms.of(CrossEntropy()), "config": config, "train": train, "teachers": teachers, **more}
    return Cast(model or student(), teacher=teachers.get("teacher"), **settings)


def stages(given: Cast, **options: Any) -> list[Any]:
    (training,) = build("g2sd", **{**SMALL, **options}).trainings(given)
    return training.stages


def ready(given: Cast, number: int, **options: Any) -> Any:
    distiller = stages(given, **options)[number].distiller
    torch.manual_seed(0)
    return distiller.setup(batch()).train()


def test_the_loss_is_smooth_and_nothing_where_the_normalised_tokens_are_met():
    hidden = torch.randn(2, 5, 8, dtype=torch.float64)
    goal = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert float(generic_loss(goal, hidden)) == pytest.approx(0, abs=1e-20)
    assert float(generic_loss(goal + 1, hidden)) == pytest.approx(0.25)
    assert float(generic_loss(goal - 4, hidden)) == pytest.approx(3)
    assert float(generic_loss(goal + 4, hidden, beta=8.0)) == pytest.approx(1)
    masked = torch.tensor([[True, False, False, True], [False, True, True, False]])
    off = goal.clone()
    off[:, 1:][~masked] += 7
    off[:, 0] += 7
    assert float(generic_loss(off, hidden, masked)) == pytest.approx(0, abs=1e-20)
    off[:, 1:][masked] += 1
    assert float(generic_loss(off, hidden, masked)) == pytest.approx(0.25)


def test_the_goal_does_not_change_with_the_scale_and_the_level_of_the_teachers_tokens():
    predicted, hidden = torch.randn(2, 3, 5, 64, dtype=torch.float64)
    scale, level = 1 + torch.rand(2, 3, 5, 1, dtype=torch.float64)
    torch.testing.assert_close(
        generic_loss(predicted, scale * hidden + level), generic_loss(predicted, hidden), rtol=1e-5, atol=0
    )
    hidden.requires_grad_()
    generic_loss(predicted.requires_grad_(), hidden).backward()
    assert hidden.grad is None
    assert predicted.grad is not None


def test_an_order_follows_from_sample_seed_and_moment_alone():
    index = torch.tensor([5, 0, 9])
    order = patch_order(index, 16, seed=2, progress=0.5)
    assert order.sort(dim=1).values.tolist() == [list(range(16))] * 3
    assert torch.equal(patch_order(index[[2, 0]], 16, 2, torch.tensor(0.5)), order[[2, 0]])
    for seed, progress in ((3, 0.5), (2, 0.51)):
        assert not torch.equal(patch_order(index, 16, seed, progress), order)
    shown = (patch_order(torch.arange(4000), 16) < 4).double().mean(dim=0)
    torch.testing.assert_close(shown, torch.full((16,), 0.25, dtype=torch.float64), rtol=0, atol=0.03)


@pytest.mark.parametrize("kind", ["DeiTForImageClassification", "ViTForImageClassification"])
def test_teacher_and_student_see_the_same_patches(kind):
    given, seen = cast(student(kind)), {}
    pair = ready(given, 0, token=0.0)
    mae = given.teachers["mae"].model
    mae.vit.register_forward_hook(lambda _, __, output: seen.update(mask=output.mask, restore=output.ids_restore))
    base = given.student.base_model
    base.embeddings.register_forward_hook(lambda _, __, output: seen.update(embedded=output))
    base.layers[0].register_forward_hook(lambda _, inputs, __: seen.update(tokens=inputs[0]))
    pair(batch())
    order = pair.prepare(batch()).extras["patch_order"]
    assert torch.equal(seen["restore"], order)
    patches = seen["embedded"][:, -16:]
    shown = (patches.unsqueeze(2) == seen["tokens"][:, None, 1:]).all(-1).any(-1)
    assert torch.equal((~shown).float(), seen["mask"])
    assert int(shown.sum()) == 4 * 4
    assert torch.equal(seen["tokens"][:, 0], seen["embedded"][:, 0])


def test_of_the_teachers_decoder_the_first_blocks_alone_run_and_its_hidden_tokens_are_the_goal():
    given, ran = cast(), []
    pair = ready(given, 0)
    mae = given.teachers["mae"].model
    for number, block in enumerate(mae.decoder.decoder_layers):
        block.register_forward_pre_hook(lambda _, given, n=number: ran.append((n, given[0])))
    total = pair(batch()).total.detach()
    assert [number for number, _ in ran] == [0, 1]
    loss = next(iter(pair.loss))
    mae(**pair.prepare(batch()).teacher_inputs)  # the whole of it
    assert [number for number, _ in ran[2:]] == [0, 1, 2]
    hidden = ran[4][1]  # enters the third block
    trace = pair.heard(pair.prepare(batch()))
    order = pair.prepare(batch()).extras["patch_order"]
    predicted = loss.predictor(loss.decoder(trace["deit.layernorm"], order))
    torch.testing.assert_close(total, generic_loss(predicted, hidden).detach())
    only = ready(cast(), 0, supervise="masked")
    assert only(batch()).total.detach() != total


def test_the_decoder_puts_each_token_in_its_place():
    decoder = PatchDecoder(3, patches=4, width=8, depth=1, heads=2)
    decoder.blocks = nn.ModuleList()
    tokens, order = torch.randn(1, 3, 3), torch.tensor([[2, 0, 3, 1]])
    found, said = decoder(tokens, order)[0] - decoder.positions[0], decoder.enter(tokens)[0]
    hidden = decoder.mask_token[0, 0]
    torch.testing.assert_close(found, torch.stack([said[0], hidden, said[1], hidden, said[2]]))
    places = sincos_positions(16, 8)
    assert not torch.equal(places[1], places[4])
    torch.testing.assert_close(places.square().sum(-1), torch.full((16,), 4.0))


def test_parts_of_a_batch_add_up_to_its_gradient():
    data, found = batch(), []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        pair = ready(cast(), 0)
        for rows in parts:
            piece = Batch(data.inputs[rows], None, data.index[rows], totals={"samples": 4.0})
            pair(piece).total.backward()
        found.append({name: p.grad for name, p in pair.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-7)


def test_the_encoder_alone_goes_on():
    given = cast(student(BOTH))
    first, second = stages(given)
    before = copy.deepcopy(given.student.state_dict())
    fit([first], given.train, quiet=True)
    moved = {name for name, value in given.student.state_dict().items() if not torch.equal(value, before[name])}
    still = {"deit.embeddings.position_embeddings", "deit.embeddings.distillation_token"}
    still |= {name for name in before if "classifier" in name}
    idle = {name for name in before if name.endswith("k_proj.bias")}  # attention does not depend on it
    assert moved - idle == set(before) - still - idle
    own = [name for name, _ in second.distiller.named_parameters()]
    assert sorted(own) == sorted(f"student.{name}" for name in before)
    modules = list(given.student.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_the_start_is_a_masked_autoencoders_and_ones_own_stays():
    given, other = cast(seed=1), cast(seed=1)
    stages(given)
    stages(other)
    embeddings = given.student.deit.embeddings
    torch.testing.assert_close(embeddings.position_embeddings[0, 2:], sincos_positions(16, 12))
    assert not embeddings.position_embeddings[0, :2].any()
    assert 0 < float(embeddings.cls_token.detach().std()) < 0.05
    assert torch.equal(embeddings.cls_token, other.student.deit.embeddings.cls_token)
    assert not torch.equal(embeddings.cls_token, embeddings.distillation_token)
    kept = student()
    first, _ = stages(cast(kept), start="own")
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), student().parameters(), strict=True))
    assert "deit.embeddings.position_embeddings" in first.learn
    assert "deit.embeddings.distillation_token" not in first.learn


@pytest.mark.parametrize("kind", ["DeiTForImageClassification", BOTH])
def test_the_class_head_learns_labels_and_the_distillation_tokens_head_the_teachers_answers(kind):
    given, data = cast(student(kind)), batch()
    pair = ready(given, 1)
    losses = pair(data)
    tokens = given.student.deit(data.inputs).last_hidden_state
    answers = given.teachers["teacher"].model(data.inputs).logits.argmax(-1)
    if kind == BOTH:
        classes, said = given.student.cls_classifier(tokens[:, 0]), given.student.distillation_classifier(tokens[:, 1])
    else:
        head = list(pair.loss)[1].head
        classes, said = given.student.classifier(tokens[:, 0]), head(tokens[:, 1])
    wanted = (F.cross_entropy(classes, data.labels) + F.cross_entropy(said, answers)) / 2
    torch.testing.assert_close(losses.total, wanted)
    torch.testing.assert_close(losses.logits, classes.detach())
    losses.total.backward()
    assert bool(given.student.deit.embeddings.distillation_token.grad.any())


def test_mixed_labels_go_to_the_class_head():
    given, data = cast(), batch()
    soft = 0.7 * F.one_hot(data.labels, 3).float() + 0.1
    pair = ready(given, 1)
    found = pair(data.replace(labels=soft)).terms["cross_entropy"]
    logits = given.student(data.inputs).logits
    torch.testing.assert_close(found, -(soft * logits.log_softmax(-1)).sum(-1).mean().detach())


def test_a_token_that_stands_second_is_one_that_is_appended_last():
    model, images = student(BOTH), batch().inputs
    with torch.no_grad():
        model.deit.embeddings.position_embeddings[:, 1] = 0
    wanted = model(images)
    tokens = model.deit.embeddings(images)
    tokens = torch.cat([tokens[:, :1], tokens[:, 2:], model.deit.embeddings.distillation_token.expand(4, -1, -1)], 1)
    for layer in model.deit.layers:
        tokens = layer(tokens, None)
    tokens = model.deit.layernorm(tokens)
    torch.testing.assert_close(model.cls_classifier(tokens[:, 0]), wanted.cls_logits)
    torch.testing.assert_close(model.distillation_classifier(tokens[:, -1]), wanted.distillation_logits)


def test_without_a_tuned_teacher_the_second_stage_is_fine_tuning():
    given, data = cast(tuned=False), batch()
    pair = ready(given, 1)
    losses = pair(data)
    assert list(losses.terms) == ["cross_entropy"]
    torch.testing.assert_close(losses.total, F.cross_entropy(given.student(data.inputs).logits, data.labels))
    alone = Cast(student(), Terms.of(CrossEntropy()), None, given.config, given.train, players={"mae": autoencoder()})
    perform(build("g2sd", **SMALL), alone, quiet=True)
    with pytest.raises(ConfigError, match=r"players\.mae"):
        stages(Cast(student(), Terms.of(CrossEntropy()), None, given.config, given.train))


def test_the_recipes_loss_takes_the_whole_of_it_for_any_vision_transformer():
    torch.manual_seed(0)
    own = ViT(8, 2, 2, num_classes=3, in_channels=1, image_size=8, patch_size=2)
    given = cast(own, loss=Terms.of(KD(2.0)))
    encoder = Encoder.of(own, batch().inputs, 16)
    assert (encoder.block, encoder.norm, encoder.prefix) == ("blocks.0", "norm", 1)
    assert (encoder.positions, encoder.tokens, encoder.resting) == ("pos_embed", ("cls_token",), ())
    first, second = stages(given, token=0.0)
    assert second.distiller.loss.names == ["kd"]
    assert (first.name, second.name) == ("generic", "specific")
    perform(build("g2sd", **SMALL, token=0.0), given, quiet=True)
    assert own(batch().inputs).shape == (4, 3)


@pytest.mark.slow
def test_two_stages_do_better_than_the_second_alone():
    """After as many steps of the task, from one start: students of a masked autoencoder that has seen no label."""
    source, sizes = load_source("digits"), {"patch_size": 4, "mask_ratio": 0.5}
    images, labels = (torch.cat(part)[:600] for part in zip(*_all(source.train), strict=True))
    held, answers = (torch.cat(part) for part in zip(*_all(source.validation), strict=True))
    mae = autoencoder(**sizes, decoder_hidden_size=16)
    optimizer = torch.optim.AdamW(mae.parameters(), 5e-3)
    torch.manual_seed(0)
    for _ in range(200):
        optimizer.zero_grad()
        mae(images[torch.randint(0, 600, (64,))]).loss.backward()
        optimizer.step()
    found: dict[str, float] = {"both": 0.0, "second": 0.0}
    for seed, name in ((3, "both"), (4, "both"), (3, "second"), (4, "second")):
        steps = 240 if name == "both" else 40
        settings = {"optimizer": "adamw", "lr": 5e-3, "schedule": "constant", "compile": "off", "device": "cpu"}
        given = cast(student(classes=10, seed=seed, patch_size=4), mae=mae.eval(), tuned=False)
        given.config, given.train = TrainConfig(steps=steps, **settings), as_loader((images, labels), batch_size=64)
        scheme = build("g2sd", **SMALL, share=200 / 240)
        list(scheme.trainings(given))  # the same start
        perform(scheme if name == "both" else build("offline"), given, quiet=True)
        with torch.no_grad():
            found[name] += float(F.cross_entropy(given.student(held).logits, answers)) / 2
    assert found["both"] < found["second"] - 0.1


def _all(split: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(batch.inputs, batch.labels) for batch in as_loader(split, batch_size=256).plain()]


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match="masked autoencoder with its decoder"):
        stages(cast(), generic="teacher")
    with pytest.raises(ConfigError, match="fewer blocks"):
        stages(cast(), teacher_blocks=4)
    with pytest.raises(ConfigError, match="no distillation token"):
        stages(cast(student("ViTForImageClassification")))
    with pytest.raises(TensorError, match="same grid of patches"):
        stages(cast(student(patch_size=4)))
    with pytest.raises(ConfigError, match="heads share"):
        build("g2sd", decoder_width=10, decoder_heads=4).decoder(12)
    with pytest.raises(ConfigError, match="no such setting of training"):
        build("g2sd", generic_train={"rate": 1})
    with pytest.raises(ConfigError, match="square grids"):
        sincos_positions(15, 8)
    with pytest.raises(TensorError):
        generic_loss(torch.zeros(1, 5, 8), torch.zeros(1, 5, 4))
    with pytest.raises(DataError, match="index"):
        ready(cast(), 0).prepare(Batch(batch().inputs))
