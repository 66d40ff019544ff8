"""Texts for causal language models: sources, tokenizers, chats, packing, batches."""

from limbeck.data.language.apart import check_packs
from limbeck.data.language.arrange import arrange
from limbeck.data.language.chat import PLAIN
from limbeck.data.language.chunks import aligned_chunks
from limbeck.data.language.corpus import Corpus, encode
from limbeck.data.language.library import LibraryTokens, TransformersTokens, train_bpe
from limbeck.data.language.load import load_tokens
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.records import Fields, Record
from limbeck.data.language.rows import Layout, Rows
from limbeck.data.language.shift import next_tokens
from limbeck.data.language.source import language_source
from limbeck.data.language.split import LanguageSplit
from limbeck.data.language.tokens import ByteTokens, Tokens
from limbeck.data.language.translate import Translation, translate
from limbeck.data.language.vocabulary import Vocabularies, compare_vocabularies, refuse_other

__all__ = [
    "PLAIN",
    "ByteTokens",
    "Corpus",
    "Fields",
    "LanguageLoader",
    "LanguageSplit",
    "Layout",
    "LibraryTokens",
    "Record",
    "Rows",
    "Tokens",
    "TransformersTokens",
    "Translation",
    "Vocabularies",
    "aligned_chunks",
    "arrange",
    "check_packs",
    "compare_vocabularies",
    "encode",
    "language_source",
    "load_tokens",
    "next_tokens",
    "refuse_other",
    "train_bpe",
    "translate",
]
