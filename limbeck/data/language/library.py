"""Tokenizers of the ``tokenizers`` and ``transformers`` libraries, and one trained on the texts at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from limbeck.core.errors import ConfigError, DataError, MissingExtra
from limbeck.data.language.chat import PLAIN, Segment, template_turns
from limbeck.data.language.records import Message, Place, said
from limbeck.data.language.tokens import Encoded, Tokens, ends_of, marked

END, PADDING = "<|endoftext|>", "<|pad|>"  # of tokenizers trained here
_ALPHABET = 256 + 2  # bytes and the two above
_KNOWN = {  # which special tokens of a bare tokenizers file are what
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>", "[BOS]"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]"),
    "pad_token": ("<pad>", "<|pad|>", "[PAD]"),
}
_STATE = ("truncation", "padding", "decoder", "version")  # in a tokenizer's description, but no rule of encoding


class LibraryTokens(Tokens):
    """A tokenizer of the ``tokenizers`` library.

    Args:
        tokenizer: Of that library.
        named: Its special tokens by name: ``bos_token``, ``eos_token``, ``pad_token``; ``None`` tells them by their
            usual spellings.
        template: Of conversations, in Jinja.
        name: For messages.
    """

    def __init__(
        self,
        tokenizer: Any,
        named: dict[str, str] | None = None,
        *,
        template: str | None = None,
        name: str = "tokenizer",
    ) -> None:
        if tokenizer.truncation is not None or tokenizer.padding is not None:  # rules of a batch, not of a text
            tokenizer = type(tokenizer).from_str(tokenizer.to_str())
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self.tokenizer, self.name, self.template = tokenizer, name, template
        added = tokenizer.get_added_tokens_decoder().values()
        self.specials = [token.content for token in added if token.special]
        if named is None:
            named = {
                kind: next(t for t in usual if t in self.specials)
                for kind, usual in _KNOWN.items()
                if any(t in self.specials for t in usual)
            }
        self.named = named
        self.size = tokenizer.get_vocab_size(with_added_tokens=True)
        ids = {kind: tokenizer.token_to_id(token) for kind, token in named.items()}
        self.bos, self.eos = ids.get("bos_token"), ids.get("eos_token")
        marked({"bos": self.bos, "eos": self.eos}, self.size, name)
        self.pad = next((i for i in (ids.get("pad_token"), self.eos) if i is not None), 0)
        with_marks, bare = (tokenizer.encode("a", add_special_tokens=put).ids for put in (True, False))
        self.front, self.back = _around(with_marks, bare, self.eos)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.array(each.ids, np.int32), ends_of(np.array(each.offsets, np.int64).reshape(-1, 2), len(text)))
            for each, text in zip(found, texts, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def turns(self, messages: Sequence[Message], first: int, place: Place) -> list[Segment]:
        if self.template is None:
            raise DataError(
                "this tokenizer has no chat template, and the data are conversations",
                where=said(place),
                found=self.name,
                remedy="say template: plain, or give one in Jinja, or its file",
            )
        return template_turns(
            self.template, messages, first, place, named=self.named, specials=[*self.specials, *self.named.values()]
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that ``transformers.AutoTokenizer`` reads."""
        try:
            from transformers import PreTrainedTokenizerFast
        except ImportError as error:
            raise MissingExtra("transformers", extra="language") from error
        own = PreTrainedTokenizerFast(tokenizer_object=self.tokenizer, **self.named)
        own.chat_template = self.template
        own.save_pretrained(str(folder))

    def rules(self) -> dict[str, Any]:
        return rules_of(self.tokenizer)

    def table(self) -> dict[str, int]:
        return self.tokenizer.get_vocab(with_added_tokens=True)


class TransformersTokens(LibraryTokens):
    """A tokenizer of the ``transformers`` library. Only the fast ones, which tell where tokens stand in the text.

    Args:
        tokenizer: Of that library.
        template: In the place of its own.
        name: For messages.

    Raises:
        DataError: It is not a fast one.
    """

    def __init__(self, tokenizer: Any, *, template: str | None = None, name: str | None = None) -> None:
        name = name or str(tokenizer.name_or_path or type(tokenizer).__name__)
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "this tokenizer does not tell where its tokens stand in a text",
                where="tokenizer",
                found=f"{type(tokenizer).__name__} ({name})",
                wanted="a fast tokenizer of transformers, with tokenizer.json",
            )
        self.whole = tokenizer
        named = {kind: str(token) for kind, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        if template is None:
            template = tokenizer.chat_template
            if isinstance(template, dict):
                template = template.get("default")
        super().__init__(tokenizer.backend_tokenizer, named, template=template, name=name)
        self.size = len(tokenizer)
        self.specials = list(tokenizer.all_special_tokens)
        put, bare = (tokenizer("a", add_special_tokens=put)["input_ids"] for put in (True, False))
        self.front, self.back = _around(put, bare, self.eos)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        found = self.whole(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [
            (np.array(ids, np.int32), ends_of(np.array(offsets, np.int64).reshape(-1, 2), len(text)))
            for ids, offsets, text in zip(found["input_ids"], found["offset_mapping"], texts, strict=True)
        ]

    def save(self, folder: str | os.PathLike[str]) -> None:
        self.whole.save_pretrained(str(folder))


def train_bpe(texts: Iterable[str], size: int, *, template: str | None = PLAIN) -> LibraryTokens:
    """Train a byte-pair encoding of bytes, in which every text can be written; the same texts give the same one.

    ``<|endoftext|>`` begins and ends a document.

    Args:
        texts: Of the training split only.
        size: Ids in all, at least 258: every byte, the end of a text, and padding.
        template: Of conversations.

    Raises:
        ConfigError: Too few ids.

    >>> tokens = train_bpe(["low lower lowest"] * 9, 262)
    >>> tokens.size, tokens.decode(tokens.encode(["lower!"])[0][0])
    (262, 'lower!')
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < _ALPHABET:
        wanted = f"{_ALPHABET} or more: every byte, {END} and {PADDING}"
        raise ConfigError("too small a vocabulary", where="tokenizer.bpe", found=repr(size), wanted=wanted)
    library = _tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PADDING, END],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    named = {"bos_token": END, "eos_token": END, "pad_token": PADDING}
    return LibraryTokens(tokenizer, named, template=template, name=f"bpe of {size}")


def rules_of(tokenizer: Any) -> dict[str, Any]:
    """How a tokenizer of the library cuts texts, as plain values; its state of the moment left out."""
    rules = json.loads(tokenizer.to_str())
    return {key: value for key, value in rules.items() if key not in _STATE}


def _around(put: list[int], bare: list[int], eos: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a tokenizer puts before and after a text; at the end of a document stands ``eos`` where there is one."""
    places = [i for i in range(len(put) - len(bare) + 1) if put[i : i + len(bare)] == bare]
    front, back = (put[: places[0]], put[places[0] + len(bare) :]) if places else ([], [])
    if eos is not None and (not back or back[-1] != eos):
        back = [*back, eos]
    return tuple(front), tuple(back)


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtra("tokenizers", extra="language") from error
    return tokenizers
