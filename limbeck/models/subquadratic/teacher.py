"""A student with mixers of linear cost from a Llama-style teacher: its sizes, and what is copied of its weights."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from limbeck.core.errors import ConfigError, ModelError
from limbeck.models.subquadratic import _home, subquadratic

Copy = Literal["all", "rest", "none"]
_FAMILIES = ("llama", "mistral", "qwen2", "limbeck_subquadratic")  # whose forward is that of the student's blocks
_MIXER, _PROJECTIONS = ".self_attn.", ("q_proj", "k_proj", "v_proj", "o_proj")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
)


def subquadratic_from(teacher: nn.Module, mixers: str | list[str] = "gla", *, copy: Copy = "all") -> Any:
    """A student of the teacher's sizes, in its precision and on its device. The teacher is not touched.

    Args:
        teacher: Of transformers, and of the kind of Llama (Llama, Mistral, Qwen2).
        mixers: What takes the place of attention, in all layers or by layer; ``attention`` keeps it.
        copy: See :func:`copy_from`.

    Raises:
        ModelError: The teacher is of another kind, or no such mixer.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> teacher = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
    >>> student, ids = subquadratic_from(teacher, "attention"), torch.arange(9).view(1, 9)
    >>> torch.allclose(student(ids).logits, teacher(ids).logits, atol=1e-6)
    True
    """
    tensors = _check(teacher)
    config: Any = teacher.config
    first = "model.layers.0."
    options = {name: getattr(config, name) for name in _SIZES} | {
        "head_dim": len(tensors[f"{first}self_attn.q_proj.weight"]) // config.num_attention_heads,
        "qkv_bias": f"{first}self_attn.q_proj.bias" in tensors,
        "out_bias": f"{first}self_attn.o_proj.bias" in tensors,
        "mlp_bias": f"{first}mlp.gate_proj.bias" in tensors,
    }
    marks = {mark: getattr(config, f"{mark}_token_id", None) for mark in ("bos", "eos", "pad")}
    student = subquadratic(config.vocab_size, mixers, marks, **options)
    copy_from(student, teacher, copy)
    return student.to(device=teacher.device, dtype=teacher.dtype).eval()


def copy_from(student: nn.Module, teacher: nn.Module, copy: Copy = "all") -> list[str]:
    """Give a student what it has in common with its teacher.

    Args:
        student: Made by :func:`~limbeck.models.subquadratic.subquadratic`; changed in place.
        teacher: See :func:`subquadratic_from`; of the same sizes.
        copy: ``all``: embeddings, perceptrons, norms, head, and the projections of queries, keys, values and outputs;
            ``rest``: all but the projections; ``none``: nothing. Layers of softmax attention are copied but with
            ``none``.

    Returns:
        Names of the tensors that were copied.

    Raises:
        ModelError: The student is none of these, the teacher is of another kind, or their sizes differ.
    """
    if copy not in get_args(Copy):
        raise ConfigError("no such choice", where="copy", found=repr(copy), wanted=", ".join(get_args(Copy)))
    check_student(student)
    theirs, own = _check(teacher), student.state_dict()
    if copy == "none":
        return []
    kept = [i for i, name in enumerate(student.config.mixers) if name == "attention"]  # type: ignore[union-attr, arg-type]
    chosen = {n for n in own if copy == "all" or _MIXER not in n or int(n.split(".")[2]) in kept}
    tensors = {n: theirs[n] for n in own if n in chosen and n in theirs}
    missing = [n for n in own if n not in theirs and not (_MIXER in n and n.split(".")[4] not in _PROJECTIONS)]
    other = [n for n in tensors if tensors[n].shape != own[n].shape]
    if missing or other:
        name = (missing or other)[0]
        raise ModelError(
            "student and teacher are not of one shape",
            where=name,
            found="not in the teacher" if missing else f"{list(own[name].shape)}",
            wanted=None if missing else f"{list(theirs[name].shape)}, as in the teacher",
            remedy="make the student with limbeck.models.subquadratic.teacher.subquadratic_from(teacher), or give it "
            "the teacher's sizes",
        )
    student.load_state_dict(tensors, strict=False)
    return list(tensors)


def check_student(student: nn.Module) -> None:
    """Refuse a student that has no mixers.

    Raises:
        ModelError: It is of another class.
    """
    if not isinstance(student, _home().SubquadraticForCausalLM):
        raise ModelError(
            "this student has no mixers of linear cost",
            where="student",
            found=type(student).__name__,
            wanted="SubquadraticForCausalLM",
            remedy="name it 'limbeck.models.subquadratic:subquadratic' with mixers and sizes in its options",
        )


def _check(teacher: nn.Module) -> dict[str, Tensor]:
    """The teacher's tensors, with the frequencies of its positions, where it is of a kind that can be copied."""
    config: Any = getattr(teacher, "config", None)
    kind = getattr(config, "model_type", type(teacher).__name__)
    if kind not in _FAMILIES or not hasattr(teacher, "lm_head"):
        raise ModelError(
            "only a teacher of the kind of Llama can be copied",
            where="teacher",
            found=str(kind),
            wanted=f"a causal language model of {', '.join(_FAMILIES[:-1])}",
            remedy="use another teacher, or copy: none",
        )
    tensors = dict(teacher.state_dict())
    if kind != _FAMILIES[-1]:
        turns: Any = teacher.model.rotary_emb  # type: ignore[union-attr]
        scaled = float(getattr(turns, "attention_scaling", 1.0)) != 1.0
        if scaled or getattr(turns, "rope_type", "default") in ("dynamic", "longrope", "yarn"):
            found = getattr(turns, "rope_type", "scaled")
            raise ModelError("positions of this kind change with the length", where="teacher.rotary_emb", found=found)
        tensors["model.inv_freq"] = torch.as_tensor(turns.inv_freq)
    return tensors
