"""Texts, conversations and templates that tests of language data share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limbeck.data.language import LibraryTokens, train_bpe

LINES = [
    "The miller's daughter walked to the mill before the rain.",
    "Bread, salt and water: three things that nobody counts.",
    "Über den Fluß führt eine Brücke; 漢字 stand there too. 😀",
    "She said: wait until the bells of the town have rung twice.",
    "1,234 sacks of flour at 5.60 each is too much for one cart!",
    "def mill(grain):\n    return grain / 2  # half is bran\n",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = (
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Who walked?"},
    {"role": "assistant", "content": "The daughter."},
    {"role": "user", "content": "Where to?"},
    {"role": "assistant", "content": "To the mill."},
)


def chat_tokens(template: str | None) -> LibraryTokens:
    """A tokenizer with ChatML's marks and a template."""
    made = train_bpe(LINES * 3, 320, template=template)
    made.tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return LibraryTokens(made.tokenizer, made.named, template=template, name="chat")


def write_lines(path: Path, rows: list[Any]) -> Path:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
