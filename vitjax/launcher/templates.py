"""Fills the templates of launch/, and quotes what goes into them: nobody else does either."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vitjax import config as config_lib
from vitjax.errors import InputError

MARK = re.compile(r"@([A-Z][A-Z_]*)@")
# JSON leaves these as they are; YAML reads them as line breaks or refuses them.
UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def folder() -> Path:
    """Where the templates lie: in the package once installed, else beside it."""
    return config_lib.config_folder().parent / "launch"


def fill(template: str, values: Mapping[str, str], own: str | None = None) -> str:
    """A template with every @MARK@ replaced; a line whose marks are all empty is left out.

    Values are put in once: a value that looks like a mark stays as it is.

    Args:
      template: the name of a file of launch/.
      own: instead, a file of the user's.

    Raises:
      InputError: no such file, or its marks are not those that there are values for.
    """
    path = Path(own) if own else folder() / template
    if not path.is_file():
        raise InputError(f"no template {str(path)!r}; copy one from {folder()}")
    used: set[str] = set()
    lines = []
    for line in path.read_text().split("\n"):
        marks = MARK.findall(line)
        unknown = [mark for mark in marks if mark not in values]
        if unknown:
            raise InputError(f"{path}: unknown @{unknown[0]}@; known: {', '.join(values)}")
        used.update(marks)
        if not marks or any(values[mark] for mark in marks):
            lines.append(MARK.sub(lambda found: values[found[1]], line))
    lost = [mark for mark in values if mark not in used]
    if lost:
        raise InputError(f"{path} has no @{lost[0]}@ any more; restore the line")
    return "\n".join(lines)


def shell(words: Iterable[str]) -> str:
    """Words as one line of shell, each of them whole."""
    return " ".join(map(shlex.quote, words))


def yaml(value: Any) -> str:
    """A text, number, list or dict as YAML of one line: JSON, which YAML contains."""
    text = json.dumps(value, ensure_ascii=False)
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def container(words: Iterable[str]) -> str:
    """Words of a Kubernetes command: there $(NAME) means a variable's value, and $$ a dollar."""
    return yaml([word.replace("$", "$$") for word in words])


def check_text(words: Iterable[str]) -> None:
    """Raises InputError at a word that no file of text can hold."""
    for word in words:
        if not word.isprintable() and "\0" in word:
            raise InputError(f"{word!r} holds a zero byte")
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{word!r} is not UTF-8") from error
