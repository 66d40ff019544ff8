"""How units are judged, which stay, and that units of no use leave without a trace."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.compression import measure_importance, student_from
from limbeck.core.errors import ModelError

pytest.importorskip("transformers")
from tests.compression.teachers import inputs_for, logits, scramble, silence, teacher_of

BERT_LAYER = "bert.encoder.layer.1"
RMS = ("llama", "qwen2", "mistral", "phi3")


def given_to(teacher: Any, module: str, inputs: dict[str, Tensor]) -> Tensor:
    """What a module is given, ``[B, T, D]``."""
    found: list[Tensor] = []
    handle = teacher.get_submodule(module).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    logits(teacher, inputs)
    handle.remove()
    return found[0].reshape(*inputs["input_ids"].shape, -1)


def minitron(batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The paper's score from activations ``[B, T, units]`` and masks ``[B, T]``, sample by sample."""
    total = 0.0
    for activations, mask in batches:
        for sample, counts in zip(activations, mask, strict=True):
            total = total + sample[counts.bool()].abs().mean(0) ** 2
    return total.sqrt()  # type: ignore[union-attr]


@pytest.mark.parametrize(("family", "layer"), [("llama", "model.layers.2"), ("opt", "model.decoder.layers.1")])
def test_importance_is_the_papers(family: str, layer: str) -> None:
    teacher = teacher_of(family)
    batches = [inputs_for(teacher, seed=1), inputs_for(teacher, samples=2, seed=2)]
    axes = ("ffn", "heads") if family == "llama" else ("ffn",)
    found = measure_importance(teacher, batches, axes)
    reader = f"{layer}.mlp.down_proj" if family == "llama" else f"{layer}.fc2"
    expected = minitron([(given_to(teacher, reader, b), b["attention_mask"]) for b in batches])
    torch.testing.assert_close(found[reader].double(), expected, rtol=1e-5, atol=0)
    if family == "llama":
        reader = f"{layer}.self_attn.o_proj"
        lengths = [given_to(teacher, reader, b).unflatten(-1, (4, -1)).norm(dim=-1) for b in batches]
        expected = minitron([(x, b["attention_mask"]) for x, b in zip(lengths, batches, strict=True)])
        torch.testing.assert_close(found[reader].double(), expected, rtol=1e-5, atol=0)


def test_hidden_units_are_judged_by_all_norms() -> None:
    teacher = teacher_of("llama")
    inputs = inputs_for(teacher)
    found = measure_importance(teacher, [inputs], ["hidden"])["hidden"]
    norms = [n for i in range(4) for n in (f"{i}.input_layernorm", f"{i}.post_attention_layernorm")]
    outputs: list[Tensor] = []
    handles = [
        teacher.get_submodule(name).register_forward_hook(lambda _, __, output: outputs.append(output))
        for name in [*(f"model.layers.{n}" for n in norms), "model.norm"]
    ]
    logits(teacher, inputs)
    for handle in handles:
        handle.remove()
    assert len(outputs) == 9
    expected = sum(minitron([(output, inputs["attention_mask"])]) for output in outputs)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "judged"),
    [("llama", "activations"), ("llama", "weights"), ("gpt2", "activations"), ("gpt2", "weights"), ("t5", "weights")],
)
def test_dead_units_go_first_and_without_a_trace(family: str, judged: str) -> None:
    """Units whose inputs are zero are never active; those whose outputs are zero are seen in the weights alone."""
    teacher = copy.deepcopy(teacher_of(family))
    inputs = inputs_for(teacher)
    count, alive = (128, 100) if family == "gpt2" else (48, 30)
    gates = {"llama": "up_proj", "gpt2": "c_fc", "t5": None}[family]
    outputs = {"llama": "down_proj", "gpt2": "mlp.c_proj", "t5": "DenseReluDense.wo"}[family]
    stays = {}
    with torch.no_grad():
        for name, module in teacher.named_modules():
            units = torch.randperm(count)[:alive].sort().values
            owner = name.rpartition(".")[0]
            if name.endswith(outputs) and judged == "weights":
                silence(teacher, name, units, count)
                stays[name] = units
            elif gates is not None and name.endswith(gates) and judged == "activations":
                dead = torch.ones(count, dtype=torch.bool).index_fill_(0, units, False)
                (module.weight.T if type(module).__name__ == "Conv1D" else module.weight)[dead] = 0
                if module.bias is not None:
                    module.bias[dead] = 0
                stays[f"{owner}.{outputs.rpartition('.')[2]}"] = units
    made = student_from(teacher, ffn=alive, importance=[inputs] if judged == "activations" else None)
    assert made.report.kept["ffn"].keys() == stays.keys()
    for name, units in stays.items():
        assert torch.equal(made.report.kept["ffn"][name], units)
    torch.testing.assert_close(logits(made.student, inputs), logits(teacher, inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "phi3", "t5"])
def test_dead_heads_go_first_and_without_a_trace(family: str) -> None:
    teacher = copy.deepcopy(teacher_of(family))
    inputs = inputs_for(teacher)
    alive = torch.tensor([1, 2])  # of grouped heads one in each group; T5 keeps the same in all layers
    names = [n for n, m in teacher.named_modules() if n.endswith(("o_proj", "Attention.o"))]
    with torch.no_grad():
        for name in names:
            silence(teacher, name, alive, 4)
    made = student_from(teacher, heads=2)
    assert {name: units.tolist() for name, units in made.report.kept["heads"].items()} == {n: [1, 2] for n in names}
    torch.testing.assert_close(logits(made.student, inputs), logits(teacher, inputs), rtol=0, atol=1e-12)


def test_silent_heads_are_seen_on_calibration_batches() -> None:
    teacher = copy.deepcopy(teacher_of("qwen3"))
    inputs = inputs_for(teacher)
    with torch.no_grad():
        for i in range(4):  # the values of one group, which two heads read
            teacher.model.layers[i].self_attn.v_proj.weight.view(2, 16, 32)[i % 2] = 0
    made = student_from(teacher, kv_heads=1, importance=[inputs])
    for i in range(4):
        stay = made.report.kept["heads"][f"model.layers.{i}.self_attn.o_proj"].tolist()
        assert stay == ([2, 3] if i % 2 == 0 else [0, 1])
    torch.testing.assert_close(logits(made.student, inputs), logits(teacher, inputs), rtol=0, atol=1e-12)


@torch.no_grad()
def with_dead_hidden_units(family: str, alive: Tensor) -> Any:
    """A teacher in whose residual stream some units are zero throughout, and (for layer norms) the mean is zero."""
    rms = {"rms_norm_eps": 1e-12} if family in RMS else {}  # else epsilon is a part of the mean square that stays
    teacher = copy.deepcopy(teacher_of(family, **rms))
    projections = ("o_proj", "down_proj", "out_proj", "fc2", "dense_4h_to_h", "attention.dense", "c_proj")
    dead = torch.ones(32, dtype=torch.bool).index_fill_(0, alive, False)

    def silence_outputs(values: Tensor) -> None:
        """Of a tensor ``[*, 32]``."""
        values[..., dead] = 0
        values[..., alive] -= values[..., alive].mean(-1, keepdim=True)

    for name, module in teacher.named_modules():
        if isinstance(module, nn.Embedding):
            silence_outputs(module.weight)
        elif name.endswith(projections):
            silence_outputs(module.weight if type(module).__name__ == "Conv1D" else module.weight.T)
            if module.bias is not None:
                silence_outputs(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.bias is not None:
            module.bias[dead] = 0  # a norm's bias would wake them up
    return teacher


@pytest.mark.parametrize("family", [*RMS, "gpt2", "gpt_neox", "opt"])
def test_dead_hidden_units_leave_without_a_trace(family: str) -> None:
    alive = torch.randperm(32)[:16].sort().values
    teacher = with_dead_hidden_units(family, alive)
    inputs = inputs_for(teacher)
    made = student_from(teacher, hidden=16, importance=[inputs])
    assert torch.equal(made.report.kept["hidden"][""], alive)
    if family in RMS:
        assert made.student.config.hidden_size == 16
        assert made.student.config.num_attention_heads * made.student.config.head_dim == 32
        torch.testing.assert_close(logits(made.student, inputs), logits(teacher, inputs), rtol=1e-4, atol=1e-5)
        return
    # Heads leave too here: silence the same ones in the teacher.
    expected = copy.deepcopy(teacher)
    for name, units in made.report.kept["heads"].items():
        assert len(units) == 2
        silence(expected, name, units, 4)
    torch.testing.assert_close(logits(made.student, inputs), logits(expected, inputs), rtol=1e-3, atol=1e-3)
    assert (logits(expected, inputs) - logits(teacher, inputs)).abs().max() > 0.1


def test_norms_are_rescaled_only_where_it_is_known_by_how_much() -> None:
    alive = torch.arange(0, 32, 2)
    teacher = with_dead_hidden_units("llama", alive)
    inputs = inputs_for(teacher)
    blind = student_from(teacher, hidden=16)
    assert torch.equal(blind.report.kept["hidden"][""], alive)
    assert "norms are not rescaled" in blind.report.notes[0]
    assert (logits(blind.student, inputs) - logits(teacher, inputs)).abs().max() > 0.1
    seen = student_from(teacher, hidden=16, importance=[inputs])
    ratio = seen.student.model.norm.weight / teacher.model.norm.weight[alive]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2**0.5), rtol=1e-5, atol=0)


def test_where_heads_fill_the_model_they_follow_it() -> None:
    teacher = teacher_of("bert")
    inputs = inputs_for(teacher)
    made = student_from(teacher, hidden=0.5, importance=[inputs])
    assert (made.student.config.hidden_size, made.student.config.num_attention_heads) == (16, 2)
    assert made.report.sizes["heads"] == (4, 2)
    attention = made.student.bert.encoder.layer[1].attention
    units, heads = (
        made.report.kept["hidden"][""],
        made.report.kept["heads"]["bert.encoder.layer.1.attention.output.dense"],
    )
    rows = torch.cat([torch.arange(8) + 8 * int(h) for h in heads])
    source = teacher.bert.encoder.layer[1].attention
    torch.testing.assert_close(attention.self.query.weight, source.self.query.weight[rows][:, units], rtol=0, atol=0)
    torch.testing.assert_close(
        attention.output.dense.weight, source.output.dense.weight[units][:, rows], rtol=0, atol=0
    )
    for cut, message in (
        ({"heads": 2}, "number cannot change alone.*give hidden=16 too"),
        ({"hidden": 20}, "hidden=20.*wanted a multiple of 8"),
        ({"hidden": 16, "heads": 3}, "hidden=16, heads=3"),
        ({"hidden": 16, "kv_heads": 1}, "no heads for keys and values alone"),
    ):
        with pytest.raises(Exception, match=message):
            student_from(teacher, **cut)


def test_kept_units_are_nested() -> None:
    """So that a smaller student's weights are among a larger one's."""
    teacher = teacher_of("llama")
    inputs = inputs_for(teacher)
    kept = [student_from(teacher, ffn=n, importance=[inputs]).report.kept["ffn"] for n in (10, 20, 30)]
    for smaller, larger in itertools.pairwise(kept):
        assert all(set(smaller[name].tolist()) < set(larger[name].tolist()) for name in smaller)


@pytest.mark.parametrize(
    ("family", "cut", "message"),
    [
        ("t5", {"hidden": 16}, "'t5' cannot be cut along hidden: .*power of the hidden size"),
        ("t5", {"kv_heads": 1}, "no heads for keys and values alone"),
        ("vit", {"vocabulary": [1]}, "vocabulary: the configuration of 'vit' holds no one number"),
    ],
)
def test_what_a_family_does_not_allow_is_told(family: str, cut: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        student_from(teacher_of(family), **cut)


def build(config_class: str, model_class: str, **options: Any) -> Any:
    import transformers

    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options)).eval()
    scramble(model)
    return model


def test_families_nobody_wrote_down() -> None:
    """What shapes tell is cut; what they do not is refused by name; what is cut wrongly is found out."""
    sizes = {"vocab_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    grouped = {**sizes, **ids, "num_key_value_heads": 2, "intermediate_size": 48}
    olmo = build("OlmoConfig", "OlmoForCausalLM", **grouped)
    assert student_from(olmo, ffn=20, heads=2, layers=2).report.difference < 1e-5  # type: ignore[operator]
    with pytest.raises(ModelError, match="'olmo' cannot be cut along hidden: .*not known to allow it"):
        student_from(olmo, hidden=16)
    # Its norm runs over all heads at once, so heads cannot go: told from what comes out.
    with pytest.raises(ModelError, match="'olmo2' cannot be cut along heads.*relative difference"):
        student_from(build("Olmo2Config", "Olmo2ForCausalLM", **grouped), heads=2)
    bloom = build("BloomConfig", "BloomForCausalLM", vocab_size=40, hidden_size=32, n_layer=3, n_head=4, **ids)
    assert student_from(bloom, layers=2).report.difference == pytest.approx(0, abs=1e-6)
    with pytest.raises(ModelError, match="ffn: the configuration of 'bloom' holds no one number"):
        student_from(bloom, ffn=20)
    with pytest.raises(ModelError, match="'bloom' cannot be cut along hidden"):
        student_from(bloom, hidden=16)
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    mixtral = build("MixtralConfig", "MixtralForCausalLM", **grouped, **experts)
    with pytest.raises(ModelError, match="experts.gate_up_proj: 'mixtral' cannot be cut along ffn"):
        student_from(mixtral, ffn=20)
    assert student_from(mixtral, layers=2, heads=2).report.difference < 1e-5  # type: ignore[operator]
    small = {"vocab_size": 40, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    scaled = build("GPT2Config", "GPT2LMHeadModel", **small, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="'gpt2' cannot be cut along n_layer.*relative difference"):
        student_from(scaled, layers=[0, 2])
