"""A Llama whose attention is replaced, layer by layer, by mixers of linear cost; a model of transformers.

Tensors that both have are called and shaped as Llama's, so that they can be copied from a teacher.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast

from limbeck.core.errors import ModelError, did_you_mean
from limbeck.models.subquadratic.mixer import Mixer, Rotary, State
from limbeck.models.subquadratic.mixers import MIXERS


class SubquadraticConfig(PretrainedConfig):
    """Sizes, as Llama's configuration calls them, and the mixer of each layer.

    Args:
        mixers: One of :mod:`~limbeck.models.subquadratic.mixers` for all layers, or a list of them by layer.
        qkv_bias, out_bias: Whether these projections have biases.
    """

    model_type = "limbeck_subquadratic"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  transformers' own form

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 512,
        intermediate_size: int = 1376,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        mixers: str | list[str] = "gla",
        hidden_act: str = "silu",
        qkv_bias: bool = False,
        out_bias: bool = False,
        mlp_bias: bool = False,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **more: Any,
    ) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, locals()[name])
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.mixers = [mixers] * num_hidden_layers if isinstance(mixers, str) else list(mixers)
        self.hidden_act, self.qkv_bias, self.out_bias, self.mlp_bias = hidden_act, qkv_bias, out_bias, mlp_bias
        self.rms_norm_eps, self.rope_theta, self.initializer_range = rms_norm_eps, rope_theta, initializer_range
        self.use_cache = use_cache
        more["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**more)


class Norm(nn.Module):
    """Root-mean-square normalisation as Llama does it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class GatedMLP(nn.Module):
    """Llama's perceptron."""

    def __init__(self, config: SubquadraticConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=bias), nn.Linear(width, inner, bias=bias)
        self.down_proj, self.act_fn = nn.Linear(inner, width, bias=bias), ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SubquadraticBlock(nn.Module):
    """Norm, mixer, norm, perceptron; each pair added to the stream."""

    def __init__(self, config: SubquadraticConfig, number: int) -> None:
        super().__init__()
        self.self_attn: Mixer = MIXERS[config.mixers[number]](config)
        self.mlp = GatedMLP(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        mixed, state = self.self_attn(self.input_layernorm(x), rotary, mask, state)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), state


class Remembered:
    """What all layers remember of the tokens so far: of constant size, but for layers of softmax attention."""

    is_compileable = False

    def __init__(self, states: list[State], seen: int) -> None:
        self.states, self.seen = states, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other rows: beam search goes on with some and drops others."""
        self.states = [tuple(t.index_select(0, beam_idx.to(t.device)) for t in state) for state in self.states]


class SubquadraticPreTrainedModel(PreTrainedModel):
    """What transformers asks of a family."""

    config_class = SubquadraticConfig
    base_model_prefix = "model"
    _no_split_modules = ["SubquadraticBlock"]  # noqa: RUF012  transformers' own form
    _is_stateful = True
    _keep_in_fp32_modules_strict = {"inv_freq"}  # noqa: RUF012  transformers' own form

    def _init_weights(self, module: nn.Module) -> None:
        if any(getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False)):
            return
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Mixer):
            module.reset()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # it makes its own


class SubquadraticModel(SubquadraticPreTrainedModel):
    """Embeddings, blocks and a last norm."""

    inv_freq: Tensor

    def __init__(self, config: SubquadraticConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SubquadraticBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        # Kept with the weights: teachers have frequencies of many kinds.
        powers = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        self.register_buffer("inv_freq", config.rope_theta**-powers)
        self.post_init()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Frequencies stay in single precision: of half of one a long text's last positions would be one."""
        whole = self.inv_freq
        super()._apply(fn, recurse)
        if not self.inv_freq.is_meta and not whole.is_meta:
            self.inv_freq = whole.to(self.inv_freq.device)
        return self

    def rotary(self, position_ids: Tensor) -> Rotary:
        """Cosines and sines of positions ``[B or 1, L]``."""
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Remembered | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Remembered | None]:
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length, seen = x.shape[1], 0 if past_key_values is None else past_key_values.seen
        if position_ids is None:
            position_ids = torch.arange(seen, seen + length, device=x.device).unsqueeze(0)
        mask = None if attention_mask is None else attention_mask[:, -length:] > 0
        rotary, states = self.rotary(position_ids), []
        for number, layer in enumerate(self.layers):
            state = None if past_key_values is None else past_key_values.states[number]
            x, state = layer(x, rotary, mask, state)
            states.append(state)
        return self.norm(x), Remembered(states, seen + length) if use_cache else None


class SubquadraticForCausalLM(SubquadraticPreTrainedModel, GenerationMixin):
    """A causal language model; see :func:`limbeck.models.subquadratic.subquadratic`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  transformers' own form

    def __init__(self, config: SubquadraticConfig) -> None:
        super().__init__(config)
        self.model = SubquadraticModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Remembered | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        keep = self.config.use_cache and not self.training if use_cache is None else use_cache
        x, past = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, keep)
        logits, loss = self.lm_head(x[:, -logits_to_keep:]), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past)

    def prepare_inputs_for_generation(  # type: ignore[override]  # its arguments differ between versions
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        past = past_key_values if isinstance(past_key_values, Remembered) else None
        news = input_ids if past is None else input_ids[:, past.seen :]
        given: dict[str, Any] = {"input_ids": news, "past_key_values": past, "use_cache": use_cache is not False}
        if attention_mask is not None:
            place = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
            given |= {"attention_mask": attention_mask, "position_ids": place[:, -news.shape[1] :]}
        return given


def check_sizes(config: SubquadraticConfig) -> None:
    """Refuse sizes that do not fit each other.

    Raises:
        ModelError: They do not, or there is no such mixer.
    """
    for name in config.mixers:
        if name not in MIXERS:
            remedy = did_you_mean(name, MIXERS)
            raise ModelError("no such mixer", where="mixers", found=repr(name), wanted=", ".join(MIXERS), remedy=remedy)
    if len(config.mixers) != config.num_hidden_layers:
        wanted = f"one for each of {config.num_hidden_layers} layers, or one for all"
        raise ModelError("mixers are given by layer", where="mixers", found=len(config.mixers), wanted=wanted)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        wanted = f"a divisor of {heads} heads"
        raise ModelError("heads share keys and values evenly", where="num_key_value_heads", found=groups, wanted=wanted)
    if config.head_dim % 2:
        raise ModelError("positions turn pairs of numbers", where="head_dim", found=config.head_dim, wanted="even")
