"""The training step as XLA compiles it for an H100 that is not there."""

import collections
import re
import subprocess
import sys

import pytest

from tests.test_planning import needs_cuda

pytestmark = needs_cuda
DEPTH, BATCH, TOKENS, WIDTH = 2, 256, 196, 384

# In a process of its own: the compiler's flags must be set before JAX starts.
SCRIPT = f"""
import sys
from vitjax.planning import targets
target = targets.parse_target(sys.argv[1])
targets.prepare(target)
from vitjax import config as config_lib, experiment
config = config_lib.base_config()
config.batch_size = {BATCH}
config.model.update(shape="S/16", depth={DEPTH}, num_classes=1000)
config.precision.compute = "bfloat16"
config_lib.override(config, sys.argv[2:])
exp = experiment.build(config, devices=targets.devices(target))
print(exp.summary(), file=sys.stderr)
print(exp.compile().as_text())
"""


def compiled(*words: str, target: str = "gpu:h100:1x1x1") -> tuple[str, str]:
    command = [sys.executable, "-c", SCRIPT, target, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def calls(text: str) -> collections.Counter[str]:
    return collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text))


@pytest.fixture(scope="module")
def program() -> tuple[str, str]:
    return compiled()


def entry(text: str) -> list[tuple[str, str, str]]:
    """Name, type and opcode of each instruction of the program's outermost computation."""
    body = text[text.index("\nENTRY ") :]
    return re.findall(r"^  (?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(", body, re.M)


def test_attention_is_cudnns_and_nothing_is_computed_twice(program):
    text, said = program
    found = calls(text)
    assert found["__cudnn$fmhaSoftmax"] == found["__cudnn$fmhaSoftmaxBackward"] == DEPTH
    # A block's four products, each once forward and twice backward; the patches' two (of images no
    # gradient is asked) and the head's three.
    assert found["__cublas$lt$matmul"] == 12 * DEPTH + 2 + 3
    assert "attention cudnn (not measured)" in said and "no recomputation" not in said
    assert "recomputation none (GiB" in said


def test_the_activation_and_the_biases_end_the_products(program):
    text, _ = program
    found = collections.Counter(re.findall(r'"epilogue":"([A-Z_]+)"', text))
    assert found["BIAS_GELU_AUX"] == DEPTH
    assert found["BIAS"] == 3 * DEPTH + 2  # the block's others, the patches', the head's


def test_tokens_lie_row_by_row_and_are_never_transposed(program):
    text, _ = program
    for name, kind, _ in entry(text):
        for dims, order in re.findall(r"\[([\d,]+)\]\{([\d,]+)", kind):
            if dims in (f"{BATCH},{TOKENS},{WIDTH}", f"{BATCH * TOKENS},{WIDTH}"):
                assert order in ("2,1,0", "1,0"), (name, kind)
    moves = [n for n, kind, _ in entry(text) if "transpose" in n and f"[{BATCH},{TOKENS}," in kind]
    assert moves == []


def test_between_products_nothing_is_kept_in_float32(program):
    text, _ = program
    size = BATCH * TOKENS * WIDTH
    wide = []
    for name, kind, opcode in entry(text):
        for dims in re.findall(r"f32\[([\d,]+)\]", kind):
            numbers = [int(d) for d in dims.split(",")]
            is_tokens = BATCH in numbers[:1] or BATCH * TOKENS in numbers[:1]
            product = 1
            for number in numbers:
                product *= number
            if is_tokens and product >= size and opcode != "get-tuple-element":
                wide.append((name, kind))
    # The last norm's output and its gradient, which the mean over tokens takes in float32.
    assert len(wide) <= 2, wide


def test_devices_split_the_batch_without_gathering_it():
    text, _ = compiled(target="gpu:h100:1x1x4")
    found = calls(text)
    assert found["__cudnn$fmhaSoftmax"] == DEPTH
    local = BATCH // 4
    assert f"[{local * TOKENS},{WIDTH}]" in text or f"[{local},{TOKENS},{WIDTH}]" in text
    assert f"[{BATCH},{TOKENS},{WIDTH}]" not in text and f"[{BATCH * TOKENS},{WIDTH}]" not in text


def test_eight_bit_products_are_cublass():
    text, _ = compiled("precision.products=fp8")
    assert calls(text)["__cublas$lt$matmul$f8"] == 12 * DEPTH
