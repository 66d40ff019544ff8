"""What shapes and configurations do not tell about a family of transformers: one row a family.

Everything else is measured: which dimension of which tensor belongs to heads, feed-forward units, hidden units or
tokens is seen from skeletons built with one number of the configuration doubled (see ``anatomy``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Where configurations keep each size; a family's attribute map is asked first. The first name that is there counts.
FIELDS = {
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "hidden": ("hidden_size", "d_model"),
    "ffn": ("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner"),
    "vocabulary": ("vocab_size",),
}
#: Where configurations keep the number of layers, one name a stack.
LAYERS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


@dataclass(frozen=True)
class Family:
    """Facts about one family. Layouts name what follows on what along a dimension: ``"heads kv_heads kv_heads"`` is all
    query heads, then all keys, then all values; ``"3*heads"`` is query, key and value of the first head, then of the
    second.

    Args:
        outputs: Layout of what a module gives, by the end of its name. Wanted where projections are fused, or where
            heads are as wide together as the model, so that shapes cannot tell the two apart.
        inputs: Layout of what a module takes.
        hidden: Hidden units may be cut: nothing in the forward pass depends on their number, but norms.
        hidden_fields: Further numbers in the configuration that follow the hidden size where they are equal to it.
        ffn_ratio: Feed-forward units of one hidden unit, where the configuration leaves their number open.
        why: Why hidden units may not be cut.
    """

    outputs: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    hidden: bool = False
    hidden_fields: tuple[str, ...] = ()
    ffn_ratio: int | None = None
    why: str = "this family is not known to allow it"


def _coupled(inputs: str, *outputs: str, hidden_fields: tuple[str, ...] = ()) -> Family:
    """Heads together as wide as the model, each projection on its own."""
    return Family(dict.fromkeys(outputs, "heads"), {inputs: "heads"}, hidden=True, hidden_fields=hidden_fields)


_PLAIN = Family(hidden=True)  # heads, norms and projections as in Llama, each with a size of its own
_BERT = _coupled("attention.output.dense", "self.query", "self.key", "self.value")
_SCALED = "this family multiplies by a power of the hidden size"

FAMILIES: Mapping[str, Family] = {
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "phi3": Family(hidden=True, outputs={"qkv_proj": "heads kv_heads kv_heads", "gate_up_proj": "ffn ffn"}),
    "gpt2": Family(
        hidden=True, ffn_ratio=4, outputs={"attn.c_attn": "heads heads heads"}, inputs={"attn.c_proj": "heads"}
    ),
    "gpt_neox": Family(
        hidden=True, outputs={"attention.query_key_value": "3*heads"}, inputs={"attention.dense": "heads"}
    ),
    "opt": _coupled(
        "self_attn.out_proj",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        hidden_fields=("word_embed_proj_dim",),
    ),
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": _coupled("attention.out_lin", "attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "vit": _PLAIN,
    "t5": Family(why=_SCALED),
    "gemma": Family(why=_SCALED),
    "gemma2": Family(why=_SCALED),
    "gemma3_text": Family(why=_SCALED),
}


def family_of(model_type: str) -> Family:
    """The row of a family; one without facts where there is none.

    >>> family_of("gpt2").outputs
    {'attn.c_attn': 'heads heads heads'}
    """
    return FAMILIES.get(model_type, Family())
