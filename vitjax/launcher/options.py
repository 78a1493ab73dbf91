"""The options of `vitjax launch`: what they may be, and where a site's settings come in."""

import argparse
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitjax.errors import InputError, suggest
from vitjax.launcher import templates

# What may stand in a file unquoted: names that schedulers know.
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,:=+-]*")
LABEL = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")  # room for what Kubernetes appends
TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@#+-]*")


class Parser(argparse.ArgumentParser):
    """Refuses with one message that names the nearest option, as all of vitjax does."""

    def error(self, message: str) -> Any:
        raise InputError(f"{self.prog}: {message}")

    def read(self, argv: list[str]) -> argparse.Namespace:
        found, rest = self.parse_known_args(argv)
        if rest:
            known = [option for action in self._actions for option in action.option_strings]
            name = rest[0].partition("=")[0]
            raise InputError(f"{self.prog}: unknown option {name!r}; {suggest(name, known)}")
        return found


def matching(pattern: re.Pattern[str], what: str) -> Callable[[str], str]:
    """An option's type: a text that matches the whole pattern."""

    def read(text: str) -> str:
        if not pattern.fullmatch(text):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return text

    return read


def at_least(low: int) -> Callable[[str], int]:
    """An option's type: a whole number from `low` on."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} on")
        return int(text)

    return read


word = matching(WORD, "a name of letters, digits and _.,:=+-")
label = matching(LABEL, "a name of at most 40 small letters, digits and -, a letter first")
time = matching(TIME, "a time such as 90, 24:00:00 or 2-12:00:00 (minutes, h:m:s, days-h:m:s)")
image = matching(IMAGE, "an image such as registry.example.com/vitjax:1 or vitjax.sif")
path = matching(re.compile(r"/[A-Za-z0-9._/+=@-]*"), "an absolute path of plain characters")


def parser(target: str, text: str, example: str, grace: int, restarts: int) -> Parser:
    """The options that every target has."""
    made = Parser(
        prog=f"vitjax launch {target}",
        description=text,
        usage=f"vitjax launch {target} [options] -- train --config=... --workdir=...",
        epilog=f"example: {example}",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--dry-run", action="store_true", help="print what would be submitted; change nothing")
    add("--no-check", action="store_true", help="do not build the config before submitting")
    add("--max-restarts", type=at_least(0), default=restarts, metavar="N",
        help=f"after a crash (default {restarts})")  # fmt: skip
    add("--grace", type=at_least(1), default=grace, metavar="SECONDS",
        help=f"to save in, between SIGTERM and SIGKILL (default {grace})")  # fmt: skip
    return made


def add_remote(made: Parser) -> None:
    """The options of every target that is not this machine."""
    add = made.add_argument
    add("--name", type=label, help="of the job (default: vitjax- and the config's name)")
    add("--site", help="a TOML file with defaults for these options, or one's name in launch/sites")
    add("--template", help="your edited copy of the template")
    add("--shared-workdir", action="store_true", help="the workdir is shared, whatever its name")
    add("--array", action="store_true", help="a task for each trunk of a sweep: -- sweep run ...")
    add("--plan", help="where the sweep's plan can be read from here, if not in its workdir")


def add_tpu(made: Parser, *, required: bool = False) -> None:
    made.add_argument(
        "--tpu", required=required, metavar="KIND:TOPOLOGY[:SLICES]", help="such as v5e:4x4"
    )


def read(
    made: Parser, argv: list[str], *, takes_lines: bool = False
) -> tuple[argparse.Namespace, dict[str, list[str]]]:
    """The options, those of a site's file included; and the lines that the site adds.

    Raises:
      InputError: an unknown option or key, or a value that is not allowed.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--site")
    site = first.parse_known_args(argv)[0].site
    if site is None or any(word in ("-h", "--help") for word in argv):
        return made.read(argv), {}
    defaults, lines = read_site(site)
    if lines and not takes_lines:
        raise InputError(f"site {site!r}: [lines] are for vitjax launch slurm alone")
    known = {a.dest: a for a in made._actions if a.option_strings}
    before = []
    for key, value in defaults.items():
        action = known.get(key.replace("-", "_"))
        if action is None:
            raise InputError(f"site {site!r}: unknown option {key!r}; {suggest(key, known)}")
        flag = action.option_strings[-1]
        if action.nargs == 0:
            before += [flag] if value is True else []
        else:
            items = value if isinstance(value, list) else [value]
            before += [f"{flag}={item}" for item in items]
    return made.read([*before, *argv]), lines


def read_site(name: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """A site's options, and its lines: `sbatch` (#SBATCH ...) and `setup` (shell, as it is)."""
    shipped = {p.stem: p for p in sorted((templates.folder() / "sites").glob("*.toml"))}
    file = Path(name) if name.endswith(".toml") else shipped.get(name)
    if file is None or not file.is_file():
        raise InputError(f"no site {name!r}: neither a TOML file nor shipped; "
                         f"{suggest(name, shipped)}")  # fmt: skip
    try:
        content = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"site {file}: {error}") from error
    parts = ("options", "lines")
    for key in content:
        if key not in parts:
            raise InputError(f"site {file}: unknown table [{key}]; {suggest(key, parts)}")
    lines = content.get("lines", {})
    for key, values in lines.items():
        if key not in ("sbatch", "setup"):
            raise InputError(
                f"site {file}: unknown lines.{key}; {suggest(key, ('sbatch', 'setup'))}"
            )
        for line in values:
            if "\n" in line or (key == "sbatch" and not line.startswith("#SBATCH --")):
                raise InputError(f"site {file}: {line!r} is not one line, or no #SBATCH --...")
    return content.get("options", {}), lines
