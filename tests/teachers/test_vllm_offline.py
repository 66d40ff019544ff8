"""The vLLM teacher with a stand-in for the library, whose classes have the attributes that vLLM documents."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pytest

from limbeck.core.errors import ConfigError, MissingExtra
from limbeck.teachers.answers import Answer, Token, Usage
from limbeck.teachers.routed import RoutedTeacher, TextTeacher
from limbeck.teachers.vllm_offline import VllmTeacher


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Any = None
    max_tokens: int = 16
    logprobs: int | None = None
    top_k: int = 0


@dataclass
class Logprob:
    logprob: float
    decoded_token: str | None
    rank: int | None = None


@dataclass
class LLM:
    model: str
    dtype: str = "auto"
    calls: list[tuple[str, list[Any], SamplingParams]] = field(default_factory=list)

    def generate(self, prompts: list[str], sampling_params: SamplingParams, use_tqdm: bool = True) -> list[Any]:
        self.calls.append(("generate", prompts, sampling_params))
        return [self._output(prompt, sampling_params) for prompt in prompts]

    def chat(self, messages: list[Any], sampling_params: SamplingParams, use_tqdm: bool = True) -> list[Any]:
        self.calls.append(("chat", messages, sampling_params))
        return [self._output(talk[-1]["content"], sampling_params) for talk in messages]

    def _output(self, text: str, options: SamplingParams) -> Any:
        row = {7: Logprob(-2.0, "x"), 8: Logprob(-0.5, " y"), 9: Logprob(-1.0, None)}
        outputs = [
            types.SimpleNamespace(
                text=f"{text} {i}",
                token_ids=(7,),
                logprobs=None if options.logprobs is None else [row],
                finish_reason="stop",
            )
            for i in range(options.n)
        ]
        return types.SimpleNamespace(outputs=outputs, prompt_token_ids=[1, 2, 3])


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.mark.usefixtures("vllm")
def test_it_answers_as_the_served_teacher_does() -> None:
    teacher = VllmTeacher("tiny", batch=2, dtype="bfloat16")
    talk = [{"role": "user", "content": "c"}]
    answers = teacher.generate(["a", "b", talk], max_tokens=4, n=2, top_logprobs=2, seed=3, extra={"top_k": 5})
    assert [[a.text for a in found] for found in answers] == [["a 0", "a 1"], ["b 0", "b 1"], ["c 0", "c 1"]]
    # The chosen token is none of the two likeliest, and stands beside them.
    tokens = (Token("x", -2.0, (Token(" y", -0.5), Token("", -1.0))),)
    assert answers[0][0] == Answer("a 0", tokens, "stop", Usage(3, 1), model="tiny")
    assert teacher.asked == 6
    calls = teacher._engine.calls
    assert [(kind, len(prompts)) for kind, prompts, _ in calls] == [("chat", 2), ("chat", 1)]
    assert calls[0][1][0] == [{"role": "user", "content": "a"}]
    assert calls[0][2] == SamplingParams(n=2, seed=3, max_tokens=4, logprobs=2, top_k=5)
    assert teacher._engine.dtype == "bfloat16"


@pytest.mark.usefixtures("vllm")
def test_texts_are_completed_as_they_stand() -> None:
    teacher = VllmTeacher("tiny", api="completions")
    ((answer,),) = teacher.generate(["a"], max_tokens=4)
    assert (answer.text, answer.tokens) == ("a 0", None)
    assert teacher._engine.calls[0][:2] == ("generate", ["a"])
    with pytest.raises(ConfigError, match=r"prompts\[0\]: messages cannot be completed"):
        teacher.generate([[{"role": "user", "content": "c"}]], max_tokens=4)
    with pytest.raises(ConfigError, match="max_tokens: out of range"):
        teacher.generate(["a"], max_tokens=0)


@pytest.mark.usefixtures("vllm")
def test_it_can_be_routed_to() -> None:
    teacher = VllmTeacher("tiny")
    assert isinstance(teacher, TextTeacher)
    answers = RoutedTeacher({"a": teacher}).generate(["x", "y"], ["a", "a"], max_tokens=4)
    assert [a.text for (a,) in answers] == ["x 0", "y 0"]


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtra, match=r"limbeck\[vllm\]"):
        VllmTeacher("tiny")
