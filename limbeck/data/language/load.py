"""One door to every tokenizer."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from limbeck.core.errors import ConfigError, DataError, LimbeckError, MissingExtra
from limbeck.data.language.chat import PLAIN
from limbeck.data.language.library import LibraryTokens, TransformersTokens, train_bpe
from limbeck.data.language.tokens import ByteTokens, Tokens
from limbeck.data.tokenizer import Tokenizer

BYTES = "bytes.json"  # what ByteTokens.save writes
_KINDS = "'bytes', {bpe: SIZE}, a folder or tokenizer.json, 'hf:NAME', or a tokenizer in hand"


def load_tokens(
    spec: Any,
    *,
    texts: Callable[[], Iterable[str]] | None = None,
    template: str | os.PathLike[str] | None = None,
    where: str = "tokenizer",
) -> Tokens:
    """Find, read or train a tokenizer.

    =============================  ==================================================================================
    spec                           is
    =============================  ==================================================================================
    ``"bytes"``                    limbeck's own of UTF-8 bytes; so is a :class:`~limbeck.data.Tokenizer` of bytes
    ``{"bpe": 2000}``              trained on ``texts``: a byte-pair encoding with so many ids
    a folder                       what ``save_pretrained`` wrote, or a student's folder
    a file                         ``tokenizer.json`` of the ``tokenizers`` library
    ``"hf:NAME"``                  of the hub, or of its local cache
    a tokenizer                    of ``transformers`` (fast ones), of ``tokenizers``, or a :class:`Tokens`
    =============================  ==================================================================================

    Args:
        spec: See above.
        texts: What one is trained on.
        template: Of conversations, in the place of its own: ``plain``, Jinja, or a file with it.
        where: The option, for messages.

    Raises:
        ConfigError: It is none of these.
        DataError: It cannot be read, or does not tell where tokens stand in a text.

    >>> load_tokens("bytes").size
    258
    """
    jinja = read_template(template)
    if isinstance(spec, Tokens):
        if jinja is not None:
            spec = copy.copy(spec)
            spec.template = jinja
        return spec
    if spec == "bytes" or (isinstance(spec, Tokenizer) and spec.tokens == "bytes"):
        return _bytes(jinja, where)
    if isinstance(spec, Tokenizer):
        remedy = "use 'bytes' or {bpe: SIZE}"
        raise ConfigError("words cannot be put together again", where=where, found="Tokenizer of words", remedy=remedy)
    if isinstance(spec, Mapping):
        if set(spec) != {"bpe"} or texts is None:
            raise ConfigError("no such tokenizer", where=where, found=dict(spec), wanted=_KINDS)
        return train_bpe(texts(), spec["bpe"], template=jinja)
    if isinstance(spec, (str, os.PathLike)):
        return _read(os.fspath(spec), jinja, where)
    if hasattr(spec, "encode_batch") and hasattr(spec, "to_str"):
        return LibraryTokens(spec, template=jinja)
    if hasattr(spec, "apply_chat_template"):
        return TransformersTokens(spec, template=jinja)
    raise ConfigError("no such tokenizer", where=where, found=type(spec).__name__, wanted=_KINDS)


def read_template(template: str | os.PathLike[str] | None) -> str | None:
    """A template: ``plain``, Jinja itself, or the file that it is in.

    Raises:
        ConfigError: It is none of these.
    """
    if template is None:
        return None
    if template == "plain":
        return PLAIN
    if isinstance(template, str) and ("{{" in template or "{%" in template):
        return template
    if not Path(template).is_file():
        raise ConfigError("no such template", where="template", found=str(template), wanted="plain, Jinja, or a file")
    return Path(template).read_text(encoding="utf-8")


def _bytes(template: str | None, where: str) -> ByteTokens:
    if template not in (None, PLAIN):
        remedy = "use template: plain, or another tokenizer"
        raise ConfigError("bytes know only the plain template", where="template", found=where, remedy=remedy)
    return ByteTokens()


def _read(spec: str, template: str | None, where: str) -> Tokens:
    path = Path(spec).expanduser()
    if path.is_file():
        try:
            import tokenizers
        except ImportError as error:
            raise MissingExtra("tokenizers", extra="language") from error
        try:
            return LibraryTokens(tokenizers.Tokenizer.from_file(str(path)), template=template, name=spec)
        except LimbeckError:
            raise
        except Exception as error:  # the library raises bare exceptions
            found = str(error).splitlines()[0]
            raise DataError("this file holds no tokenizer", where=spec, found=found, wanted="tokenizer.json") from error
    if (path / BYTES).is_file():
        return _bytes(template, where)
    if not path.is_dir() and not spec.startswith("hf:"):
        raise ConfigError("no such tokenizer", where=where, found=repr(spec), wanted=_KINDS, remedy="check the path")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtra("transformers", extra="language") from error
    name = str(path) if path.is_dir() else spec.removeprefix("hf:")
    try:
        read: Any = AutoTokenizer.from_pretrained(name, local_files_only=path.is_dir(), trust_remote_code=False)
    except Exception as error:  # whatever is wrong in the folder
        first = "".join(str(error).strip().splitlines()[:1])
        raise DataError(
            "the tokenizer cannot be read",
            where=spec,
            found=f"{type(error).__name__}: {first}",
            wanted="a folder with tokenizer.json",
        ) from error
    return TransformersTokens(read, template=template, name=spec)
