"""Chat templates that loop without end, take all memory, write without end or look for a way out of their sandbox."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from astracli.cli.main import run
from astracli.data.fetch import BUNDLED_PREFIX, bundled
from astracli.errors import UserError
from astracli.models import rendering
from astracli.models.adapter import load_tokenizer
from astracli.models.chat import ChatFormat

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLES = "{% set a = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set a.x = a.x ~ a.x %}{% endfor %}"
ASKED = [{"role": "user", "content": "1+1"}]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rendering, "CPU_S", 1)
    monkeypatch.setattr(rendering, "MEMORY_BYTES", 256 << 20)
    monkeypatch.setattr(rendering, "MOST_CHARACTERS", 1 << 20)
    return Path(shutil.copytree(bundled(f"{BUNDLED_PREFIX}tiny"), tmp_path / "model"))


def rendered(model: Path, template: str) -> str:
    (model / "chat_template.jinja").write_text(template)
    return ChatFormat().render(load_tokenizer(model), ASKED)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LOOPS, "s of CPU time"),
        ("{% set n = 10 * messages|length %}{{ n ** (n ** 9) }}", "s of CPU time"),  # one operation, in C
        (DOUBLES, "MiB of memory"),
        ("{{ 'x' * 10**11 }}", "MiB of memory"),
        ("{% for i in range(9999) %}{{ 'x' * 10000 }}{% endfor %}", "characters"),
    ],
)
def test_a_template_that_takes_too_much_ends_with_its_file(template: str, why: str, model: Path) -> None:
    with pytest.raises(rendering.TooMuch, match=f"chat_template.jinja` does not render a prompt .user.: it .*{why}"):
        rendered(model, template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append({'role': 'system'}) }}",
        "{% include '/etc/passwd' %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_raises_or_looks_for_a_way_out(template: str, model: Path) -> None:
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(Exception, match=r"unsafe|no loader|recursion depth|^no$") as raised:
        ChatFormat().render(load_tokenizer(model), ASKED)
    assert not isinstance(raised.value, UserError)


def test_a_later_prompt_of_a_kind_has_a_limit_of_time(model: Path) -> None:
    """The first one ends; the second has the same roles, and is rendered in this process."""
    (model / "chat_template.jinja").write_text("{% if 'bomb' in messages[0].content %}" + LOOPS + "{% endif %}ok")
    tokenizer = load_tokenizer(model)
    assert ChatFormat().render(tokenizer, ASKED) == "ok"
    with pytest.raises(rendering.TooMuch, match="s of CPU time"):
        ChatFormat().render(tokenizer, [{"role": "user", "content": "bomb"}])
    assert ChatFormat().render(tokenizer, ASKED) == "ok"


def test_a_command_names_the_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": DOUBLES + "{{ a.x }}"}))
    words = ["train", "qwen3.5-tiny-m2po-delta", "--dry-run", "--set", f"model.path={model}"]
    assert run(words) == 2
    said = capsys.readouterr().err
    assert f"the chat template in `{model / 'tokenizer_config.json'}` does not render a prompt" in said
