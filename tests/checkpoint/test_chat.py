"""Chat templates that fail: errors of ours, whatever jinja2 raises."""

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


@pytest.mark.parametrize("text", ["{% for", "{% for x in messages %}" * 40 + "{% endfor %}" * 40])
def test_when_compiled(tmp_path, text):
    (tmp_path / "chat_template.jinja").write_text(text)
    with pytest.raises(CheckpointError, match=r"jinja: the chat template is not valid"):
        ChatTemplate(tmp_path, "flat", {})
