"""Chat templates: what transformers writes, and limits on whatever else they are."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graphopt.errors import RequestError
from graphopt.program.chat_template import chat_ids

CHATML = """{%- set ns = namespace(first=true) -%}
{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\n' }}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
    {%- set ns.first = false %}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA = """{{- bos_token }}{% if not tools is defined %}{% set tools = none %}{% endif -%}
{%- if tools is none and documents is none %}plain {% endif %}
{%- for m in messages %}{% if loop.index0 > 5 %}{% break %}{% endif %}
{{- '[INST] ' ~ m.content ~ ' [/INST]' }}{% generation %}{{ m | tojson }}{% endgeneration %}
{%- endfor %}{{ strftime_now('%Y')[:2] }}{{ dict(a=1).items() | list }}{{ eos_token }}"""
PLAIN = "{{ messages[0]['content'] }}"


def tokenizer(template: Any) -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="a", eos_token="b")
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", [CHATML, LLAMA, PLAIN, {"default": PLAIN, "rag": LLAMA}])
@pytest.mark.parametrize("message", ["Name two colours. ", "é☃ {{ 1 }} '\n' <|im_end|>", ""])
def test_the_text_is_that_of_transformers(template: Any, message: str) -> None:
    made = tokenizer(template)
    chat = [{"role": "user", "content": message}]
    wanted = made.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    assert chat_ids(made, message) == wanted["input_ids"]


def test_without_a_template_it_is_the_message() -> None:
    made = tokenizer(None)
    assert chat_ids(made, "ab") == made.encode("ab")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ [1] * 10**10 }}",
        "{{ range(10**9) | list }}",
        "{{ 'a' | center(10**11) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x~n.x %}{% endfor %}",
        "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = [n.x]*2 %}{% endfor %}"
        "{{ n.x }}",
        "{{ 'ab' | replace('a', 'b' * 10**6) | replace('b', 'c' * 10**6) }}",
        "{{ (10**10**9) ** (10**9) }}",
        "x" * (2 << 20),
        "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    ],
    ids=lambda template: template[:30],
)
def test_a_template_has_limits(template: str) -> None:
    with pytest.raises(RequestError, match="chat template could not be used: "):
        chat_ids(tokenizer(template), "hi")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[3].content }}", "UndefinedError"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "loader"),
        (3, "is a int"),
        ({"rag": "x"}, "without 'default'"),
    ],
)
def test_a_template_that_fails_says_why(template: Any, words: str) -> None:
    made = tokenizer(None)
    made.chat_template = template
    with pytest.raises(RequestError, match=words):
        chat_ids(made, "hi")


def test_a_message_is_a_text() -> None:
    with pytest.raises(RequestError, match="a chat message is a text, not list"):
        chat_ids(tokenizer(PLAIN), ["hi"])  # type: ignore[arg-type]
