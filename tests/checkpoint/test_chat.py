"""Chat templates that fail: errors of ours, whatever jinja2 raises."""

from typing import Any

import pytest

from embedport.checkpoint.chat import ChatTemplate
from embedport.errors import CheckpointError, InputError


@pytest.mark.parametrize(
    "text", ["{{ 1 // 0 }}", "{{ range(10**9) }}", "{{ '{5}'.format(1) }}", "{{ messages.pop() }}"]
)
def test_when_rendered(tmp_path, text):
    (tmp_path / "chat_template.jinja").write_text(text)
    template = ChatTemplate(tmp_path, "flat", {})
    with pytest.raises(InputError, match=r"jinja: the chat template rejects messages with the rol"):
        template.render(template.text("tea", None))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{% for", "jinja: the chat template is not valid"),
        (b"{% for x in messages %}" * 40 + b"{% endfor %}" * 40, "the chat template is not valid"),
        (b"{{ strftime_now('%d %b %Y') }}", "a chat template that reads the date is not supported"),
        (b"\xff", "jinja cannot be read: 'utf-8' codec"),
    ],
)
def test_when_compiled(tmp_path, text, message):
    (tmp_path / "chat_template.jinja").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        ChatTemplate(tmp_path, "flat", {})


@pytest.mark.parametrize(
    "text",
    [
        "{% generation %}\n  {{ messages[0].content }}{% endgeneration %}\n!",
        "{{ messages | tojson }}{{ 'é<' | tojson(indent=1) }}{{ 'é' | tojson(ensure_ascii=true) }}",
        "{% for m in 'ab' %}\n  {% if m == 'b' %}{% break %}{% endif %}{{ m }}\n{% endfor %}",
        "{% if add_generation_prompt or tools or documents %}no{% else %}yes{% endif %}",
    ],
)
def test_as_transformers_renders_it(tmp_path, text):
    from transformers.utils.chat_template_utils import render_jinja_template

    (tmp_path / "chat_template.jinja").write_text(text)
    template = ChatTemplate(tmp_path, "flat", {})
    chat: Any = template.text("é < 1", None)
    (expected,), _ = render_jinja_template([chat], chat_template=text)
    assert template.render(chat) == expected
