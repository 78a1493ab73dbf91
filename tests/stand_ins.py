"""Schedulers' clients that are not there: programs that record how they are called."""

import json
import sys

# What no argument may do: run, end a line or a quote, be taken for an option or for a setting.
HOSTILE = (
    "/data/a b", "$(touch ran)", "`touch ran`", "'; touch ran; '", '"; touch ran; "',
    "a\nb\n#SBATCH -n9", "\n--- \nkind: Pod", "é 日本 😀", "-x --y=z", "@NAME@ @COMMAND@",
    "$HOME ${HOME} $$(HOME) $(HOME)", "\\ \\n \\", "a: b # c", "{a: [1, *x, &y]}",
    "\x7f\x85\u2028\ufeff|", "!! & ;; ( ) < > ~ ^ % *", "",
)  # fmt: skip

RECORD = """#!{python}
import json, os, sys
with open({record!r}, "a") as file:
    file.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
{body}
"""


def install(folder, record, **bodies):
    """Writes programs that append their arguments to `record`, and then run their body (Python)."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, body in bodies.items():
        text = RECORD.format(python=sys.executable, record=str(record), name=name, body=body)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def calls(record):
    """The calls so far, each a list of words."""
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
