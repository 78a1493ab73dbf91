"""What an instruction of a program is to a reader: its kind, and where in the model it stands."""

import re

from vitjax.planning.program import KINDS as COLLECTIVES
from vitjax.planning.program import Instruction
from vitjax.profiling.costs import Program, target_of

KINDS = ("matmul", "convolution", "attention", "elementwise", "collective", "copy", "other")

_MOVES = frozenset(
    ("copy", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad",
     "reshape", "broadcast", "iota", "reverse", "gather", "bitcast", "parameter", "constant",
     "tuple", "get-tuple-element", "convert")
)  # fmt: skip
_NO_SCOPE = re.compile(
    r"^((jit|jvp|vmap|transpose|checkpoint|remat|custom_vjp|pjit)\(.*\)|while|body|cond"
    r"|closed_call|checkpoint|rematted_computation|branch_\d+_fun|.*<locals>.*|.*<lambda>.*)$"
)
_PLACE = re.compile(r'stack_frame_id=(\d+)|source_file="([^"]*)" source_line=(\d+)')
_WRAPPERS = ("chain", "with_extra_args_support")
_OUTERMOST = "on_mesh"  # around the training step


def kind_of(program: Program, instruction: Instruction) -> str:
    """One of KINDS. "elementwise" are the loops that XLA fuses, reductions among them."""
    inner = [i for i, _ in program.inside(instruction)]
    opcodes = {i.opcode for i in (instruction, *inner)}
    plain = {re.sub("-(start|done)$", "", o) for o in opcodes}
    if plain & {*COLLECTIVES, "collective-broadcast", "send", "recv"}:
        return "collective"
    targets = {target_of(i) for i in (instruction, *inner)} - {""}
    is_named_so = instruction.opcode == "custom-call" and "attention" in instruction.rest.lower()
    if any("fmha" in t for t in targets) or is_named_so:
        return "attention"
    if "convolution" in plain or any(t.startswith("__cudnn$conv") for t in targets):
        return "convolution"
    if "dot" in plain or any(t.startswith(("__cublas$", "__onednn$matmul")) for t in targets):
        return "matmul"
    if instruction.opcode == "fusion":
        return "copy" if opcodes - {"fusion"} <= _MOVES else "elementwise"
    if plain <= _MOVES:
        return "copy"
    is_other = plain & {"custom-call", "while", "call", "conditional", "sort", "rng", "fft"}
    return "other" if is_other else "elementwise"


class Scopes:
    """Finds the place in the model that an instruction was traced from.

    It is the scope of JAX's `named_scope` where there is one, else the two innermost methods (or
    functions, outside of any) of the traceback that XLA keeps, with the line in the outer one.

    Args:
      text: of the optimised program.
    """

    def __init__(self, text: str):
        files, functions = _table(text, "FileNames"), _table(text, "FunctionNames")
        locations = {k: _fields(v) for k, v in _table(text, "FileLocations").items()}
        self._frames = {k: _fields(v) for k, v in _table(text, "StackFrames").items()}
        self._places = {
            k: (
                functions.get(v.get("function_name_id", 0), "").strip('"'),
                files.get(v.get("file_name_id", 0), "").strip('"').rsplit("/", 1)[-1],
                v.get("line", 0),
            )
            for k, v in locations.items()
        }

    def of(self, program: Program, instruction: Instruction) -> str:
        """Such as "Attention/Linear layers.py:258 dot_general, backward"; "" if nothing is known.

        Of a fusion with a product in it the product's place, else that of what gives its result.
        """
        inner = [i for i, _ in program.inside(instruction)]
        products = [i for i in inner if i.opcode in ("dot", "convolution")]
        for candidate in (*products, instruction, *reversed(inner)):
            if found := re.search(r'op_name="([^"]*)"', candidate.rest):
                name, *merged = found[1].replace("/(", "/").split(":")  # collectives, of several
                break
        else:
            return ""
        parts = [p for p in name.split("/") if p and not _NO_SCOPE.match(p)]
        where = self._traceback(candidate.rest) if len(parts) < 3 else ""
        more = f"and {len(merged)} more" if merged else ""
        label = " ".join(filter(None, (where, "/".join(parts[-3:]), more)))
        if "rematted_computation" in name:
            return f"{label}, recomputed"
        return f"{label}, backward" if "transpose(" in name else label

    def _traceback(self, rest: str) -> str:
        place = _PLACE.search(rest)
        if place is None:
            return ""
        if place[2]:
            return f"{place[2].rsplit('/', 1)[-1]}:{place[3]}"
        calls: list[tuple[str, str]] = []
        for function, file, line in self._chain(int(place[1])):
            name = function.split(".<locals>")[0].removesuffix(".__call__")
            if name == _OUTERMOST:
                break
            is_detail = name.startswith(("_", "<")) or name in _WRAPPERS
            if not is_detail and (not calls or calls[-1][0] != name):
                calls.append((name, f"{file}:{line}"))
        methods = [call for call in calls if call[0][0].isupper()]
        shown = (methods or calls)[:2]
        return "/".join(n for n, _ in reversed(shown)) + f" {shown[-1][1]}" if shown else ""

    def _chain(self, frame: int) -> list[tuple[str, str, int]]:
        """The functions around an instruction with file and line, innermost first."""
        found = []
        while frame in self._frames and len(found) < 100:
            fields = self._frames[frame]
            if place := self._places.get(fields.get("file_location_id", 0)):
                found.append(place)
            frame = fields.get("parent_frame_id", 1) - 1  # XLA counts them from 1, 0 is none
        return found


def _table(text: str, name: str) -> dict[int, str]:
    """One of the numbered tables on top of a program's text."""
    found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
    lines = found[1].splitlines() if found else []
    return {int(k): v for k, _, v in (line.partition(" ") for line in lines)}


def _fields(text: str) -> dict[str, int]:
    return {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", text)}
