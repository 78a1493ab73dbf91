"""The profile of a run: what kernels must do, what they took, and that tracing changes nothing."""

import dataclasses
import json
import logging
import os
import shutil

import jax
import pytest
from conftest import tiny_config, use_one_device
from test_docs import SHRINK
from test_train import assert_same_run

from vitjax import cli
from vitjax import train as train_lib
from vitjax.errors import InputError
from vitjax.profiling import profiler, table, trace
from vitjax.profiling.costs import Program
from vitjax.profiling.labels import Scopes, kind_of
from vitjax.profiling.trace import Span

PROGRAM = """HloModule jit_train_step, is_scheduled=true

FileNames
1 "/x/vitjax/parallel.py"
2 "/x/vitjax/models/layers.py"

FunctionNames
1 "on_mesh.<locals>.wrapped"
2 "Attention.__call__"
3 "Linear.__call__"
4 "_contract"
5 "Experiment.compile"
6 "make_train_step.<locals>.train_step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=308 end_line=308 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=243 end_line=243 column=1 end_column=2}
3 {file_name_id=2 function_name_id=3 line=122 end_line=122 column=1 end_column=2}
4 {file_name_id=2 function_name_id=4 line=31 end_line=31 column=1 end_column=2}
5 {file_name_id=1 function_name_id=5 line=83 end_line=83 column=1 end_column=2}
6 {file_name_id=1 function_name_id=6 line=131 end_line=131 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=4}
5 {file_location_id=5 parent_frame_id=1}
6 {file_location_id=1 parent_frame_id=6}
7 {file_location_id=6 parent_frame_id=7}

%product (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
metadata={op_name="jit(train_step)/transpose(jvp())/closed_call/dot_general" stack_frame_id=4}
}

%slicing (stack: f32[3,8,4], row: f32[8,4], at: s32[]) -> f32[3,8,4] {
  %stack = f32[3,8,4]{2,1,0} parameter(0)
  %row = f32[8,4]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %one = f32[1,8,4]{2,1,0} bitcast(%row)
  ROOT %update = f32[3,8,4]{2,1,0} dynamic-update-slice(%stack, %one, %at, %at, %at)
}

%taking (stack.1: f32[3,8,4], at.1: s32[]) -> f32[8,4] {
  %stack.1 = f32[3,8,4]{2,1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  %slice = f32[1,8,4]{2,1,0} dynamic-slice(%stack.1, %at.1, %at.1, %at.1), \
dynamic_slice_sizes={1,8,4}
  %squeezed = f32[8,4]{1,0} bitcast(%slice)
  ROOT %exp = f32[8,4]{1,0} exponential(%squeezed)
}

%body (state: (s32[], f32[8,16], f32[16,4])) -> (s32[], f32[8,16], f32[16,4]) {
  %state = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%state), index=1
  %w = f32[16,4]{1,0} get-tuple-element(%state), index=2
  %fusion.1 = f32[8,4]{1,0} fusion(%x, %w), kind=kOutput, calls=%product
  ROOT %next = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) tuple(%i, %x, %w)
}

%condition (state.1: (s32[], f32[8,16], f32[16,4])) -> pred[] {
  %state.1 = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

%add (p: f32[], q: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  %q = f32[] parameter(1)
  ROOT %sum = f32[] add(%p, %q)
}

ENTRY %main (arg: f32[8,16]) -> f32[8,16] {
  %arg = f32[8,16]{1,0} parameter(0)
  %kernel = f32[16,4]{1,0} parameter(1)
  %index = s32[] parameter(2)
  %layers = f32[3,8,4]{2,1,0} parameter(3)
  %image = f32[2,6,6,3]{3,2,1,0} parameter(4)
  %filter = f32[3,3,3,5]{3,2,1,0} parameter(5)
  %maps = f32[2,6,6,5]{3,2,1,0} parameter(6)
  %query = bf16[2,8,4,16]{3,2,1,0} parameter(7)
  %key = bf16[2,32,4,16]{3,2,1,0} parameter(8)
  %many = f32[7,8,16]{2,1,0} parameter(9)
  %kernels = f32[7,16,4]{2,1,0} parameter(10)
  %start = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) tuple(%index, %arg, %kernel)
  %while.1 = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) while(%start), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %fusion.2 = f32[3,8,4]{2,1,0} fusion(%layers, %kernel, %index), kind=kLoop, calls=%slicing, \
metadata={op_name="jit(train_step)/mul" stack_frame_id=7}
  %fusion.3 = f32[8,4]{1,0} fusion(%layers, %index), kind=kLoop, calls=%taking, \
metadata={op_name="jit(train_step)/jvp()/blocks/attention/qkv/exp"}
  %batched = f32[7,8,4]{2,1,0} dot(%many, %kernels), lhs_batch_dims={0}, rhs_batch_dims={0}, \
lhs_contracting_dims={2}, rhs_contracting_dims={1}
  %conv = f32[2,6,6,5]{3,2,1,0} convolution(%image, %filter), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_01io->b01f
  %gemm = (f32[8,4]{1,0}, s8[64]{0}) custom-call(%arg, %kernel), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"beta":0,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %onednn = f32[7,8,4]{2,1,0} custom-call(%many, %kernels), custom_call_target="__onednn$matmul"
  %fmha = (bf16[2,4,8,16]{3,1,2,0}, u8[0]{0}) custom-call(%query, %key, %key), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": \
{"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "8", "32"]}}}
  %fmha.back = (bf16[2,4,8,16]{3,1,2,0}, u8[0]{0}) custom-call(%query, %key, %key), \
custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %cudnn = (f32[2,6,6,5]{3,2,1,0}, u8[0]{0}) custom-call(%image, %filter), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward"
  %cudnn.filter = (f32[3,3,3,5]{3,2,1,0}, u8[0]{0}) custom-call(%image, %maps), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, \
custom_call_target="__cudnn$convBackwardFilter"
  %cudnn.input = (f32[2,6,6,3]{3,2,1,0}, u8[0]{0}) custom-call(%maps, %filter), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, \
custom_call_target="__cudnn$convBackwardInput"
  %reduced = f32[8,16]{1,0} all-reduce(%arg), replica_groups={{0,1}}, to_apply=%add, \
metadata={op_name="jit(train_step)/(jvp()/closed_call/reduce_sum:transpose(jvp())/mul:add)"}
  ROOT %copy.1 = f32[8,16]{0,1} copy(%arg)
}
"""
DOT = 2 * 8 * 16 * 4
# A 3-wide kernel on 6 pixels with padding 1 meets 6 x 3 - 2 pixels along each side.
CONV = 2 * 2 * 3 * 5 * (6 * 3 - 2) ** 2
FMHA = 2 * 2 * 4 * 8 * 32 * 16  # one product: batch, heads, queries, keys, head width


@pytest.mark.parametrize(
    ("name", "kind", "flops", "num_bytes"),
    [
        ("fusion.1", "matmul", DOT, 4 * (8 * 16 + 16 * 4 + 8 * 4)),
        ("while.1", "matmul", 3 * DOT, None),
        ("batched", "matmul", 7 * DOT, 4 * 7 * (8 * 16 + 16 * 4 + 8 * 4)),
        ("gemm", "matmul", DOT, 4 * (8 * 16 + 16 * 4 + 8 * 4) + 64),
        ("onednn", "matmul", 7 * DOT, None),
        ("conv", "convolution", CONV, 4 * (2 * 36 * 3 + 9 * 15 + 2 * 36 * 5)),
        ("cudnn", "convolution", CONV, None),
        ("cudnn.filter", "convolution", CONV, None),
        ("cudnn.input", "convolution", CONV, None),
        ("fmha", "attention", 2 * FMHA, 2 * (2 * 32 * 16 + 2 * 2 * 128 * 16 + 2 * 32 * 16)),
        ("fmha.back", "attention", 5 * FMHA, None),
        ("fusion.2", "copy", 0, 4 * (8 * 4 + 8 * 4 + 1)),  # one layer of three, read and written
        ("fusion.3", "elementwise", 0, 4 * (8 * 4 + 8 * 4 + 1)),
        ("reduced", "collective", 0, 2 * 4 * 128),
        ("copy.1", "copy", 0, 2 * 4 * 128),
    ],
)
def test_work_of_an_instruction_is_what_a_hand_counts(name, kind, flops, num_bytes):
    program = Program(PROGRAM)
    instruction = program.instructions[name]
    assert kind_of(program, instruction) == kind
    assert program.flops(instruction) == flops
    assert num_bytes is None or program.bytes(instruction) == num_bytes
    assert program.counts["fusion.1"] == 3 and program.module == "jit_train_step"


def test_a_convolution_counts_no_zeros_between_dilated_pixels():
    """The gradient of a stride of 2: each pixel of it meets each of the kernel's once."""
    text = PROGRAM.replace(
        "window={size=3x3 pad=1_1x1_1}", "window={size=3x3 pad=2_2x2_2 lhs_dilate=2x2}", 1
    )
    text = text.replace("%conv = f32[2,6,6,5]", "%conv = f32[2,13,13,5]")
    program = Program(text)
    assert program.flops(program.instructions["conv"]) == 2 * 2 * 3 * 5 * (6 * 3) ** 2


def test_the_place_of_a_kernel_is_its_scope_or_its_functions():
    program, scopes = Program(PROGRAM), Scopes(PROGRAM)
    names = ("fusion.1", "fusion.2", "fusion.3", "reduced")
    where = {name: scopes.of(program, program.instructions[name]) for name in names}
    assert where["fusion.1"] == "Attention/Linear layers.py:243 dot_general, backward"
    assert where["fusion.2"] == "make_train_step parallel.py:131 mul"
    assert where["reduced"] == "reduce_sum and 2 more"
    assert where["fusion.3"] == "attention/qkv/exp"
    assert scopes.of(program, program.instructions["copy.1"]) == ""


@dataclasses.dataclass
class Event:
    name: str
    start_ns: float
    duration_ns: float
    stats: tuple = ()


@dataclasses.dataclass
class Line:
    name: str
    events: list


@dataclasses.dataclass
class Plane:
    name: str
    lines: list


def op(name, start, duration, module="jit_train_step", **stats):
    stats |= {"hlo_op": name, "hlo_module": module}
    return Event(name.split("::")[-1], start, duration, tuple(stats.items()))


def test_kernels_at_the_same_time_share_it():
    spans = [Span("a", 0, 10e9), Span("b", 4e9, 6e9), Span("a", 20e9, 21e9)]
    found = trace.charge(spans)
    assert found.seconds == pytest.approx({"a": 10.0, "b": 1.0}) and found.busy == 11.0
    assert found.spans == pytest.approx({"a": 11.0, "b": 2.0})
    assert found.calls == {"a": 2, "b": 1}


def test_a_cpu_trace_knows_work_that_other_threads_finish():
    events = [
        op("conv", 0, 1e9, _p=7),
        op("copy.1", 10e9, 2e9, _p=8),
        op("copy.1", 30e9, 2e9, module="jit_eval", _p=9),
        Event("end: copy.1", 12e9, 1.0, (("_c", 8),)),
        Event("ThunkExecutor::Execute", 0, 40e9),
    ]
    other = [Event("end: conv", 5e9, 1.0, (("_c", 7),))]
    planes = [Plane("/host:CPU", [Line("a", events), Line("b", other)]), Plane("/host:x", [])]
    found = trace.times(planes, Program(PROGRAM))
    assert found.seconds == pytest.approx({"conv": 5.0, "copy.1": 2.0})


def test_a_gpu_trace_is_read_from_the_streams_of_the_first_gpu():
    kernels = [
        op("jit(f)::gemm", 0, 1e9, kernel_details="..."),
        op("gemm", 1e9, 1e9),  # the second kernel of the same call
        op("fusion.1", 3e9, 1e9),
        op("gemm", 5e9, 1e9),
        op("gemm", 7e9, 1e9, module="jit_eval"),
        Event("MemcpyH2D", 8e9, 1e9),
    ]
    streams = [Line("Stream #13(Compute)", kernels), Line("XLA Ops", kernels[:1])]
    planes = [
        Plane("/device:GPU:1", [Line("Stream #1", [op("copy.1", 0, 9e9)])]),
        Plane("/device:GPU:0", streams),
        Plane("/host:CPU", [Line("python", [Event("copy.1", 0, 1e9)])]),
    ]
    found = trace.times(planes, Program(PROGRAM))
    assert found.seconds == pytest.approx({"gemm": 3.0, "fusion.1": 1.0})
    assert found.calls == {"gemm": 2, "fusion.1": 1}


def test_a_tpu_trace_is_read_without_its_loops():
    names = {"while.1": (0, 9), "%fusion.1 = f32[8,4]{1,0} fusion(%x, %w)": (1, 2)}
    ops = [Event(n, a * 1e9, d * 1e9) for n, (a, d) in names.items()]
    ops += [Event("fusion.1", 4e9, 2e9), Event("copy.1", 20e9, 1e9)]
    modules = [Event("jit_train_step(12345)", 0, 10e9), Event("jit_eval(3)", 20e9, 2e9)]
    planes = [Plane("/device:TPU:0", [Line("XLA Modules", modules), Line("XLA Ops", ops)])]
    found = trace.times(planes, Program(PROGRAM))
    assert found.seconds == pytest.approx({"fusion.1": 4.0}) and found.calls == {"fusion.1": 2}


def test_the_table_tells_how_far_a_kernel_is_from_its_roofline():
    times = trace.charge([Span("batched", 0, 4e9), Span("reduced", 4e9, 5e9)])
    speeds = table.Speeds(flops=7 * DOT, bandwidth=1e6, origin="data sheet")
    found = table.profile(PROGRAM, times, steps=2, wall=10.0, device="x", speeds=speeds)
    dot, reduced = found.kernels
    assert (dot.roofline, dot.times_roofline, dot.binds) == (0.5, 4.0, "compute")
    assert reduced.times_roofline is None and (found.wall, found.busy, found.idle) == (5, 2.5, 2.5)
    shown = table.plain(found)
    assert "80.0" in shown and "(50.0%) idle" in shown and "4.0  compute" in shown
    assert table.markdown(found).count("\n| --- |") == 2


def test_kernels_of_equal_layers_are_one_row():
    one = table.Kernel(("a",), "matmul", "Mlp/Linear", "f32[2]", 2, 1.0, 1.0, 8, 4, 0.5, "compute")
    two = dataclasses.replace(one, names=("b",), calls=1, seconds=2.0, flops=4, bytes=2)
    other = dataclasses.replace(one, names=("c",), scope="Attention/Linear")
    first, second = table.grouped((one, two, other))
    assert (first.names, first.calls, first.seconds, first.flops) == (("a", "b"), 3, 3.0, 12)
    assert second.names == ("c",)


@pytest.mark.parametrize(
    ("steps", "done", "said"),
    [(0, 0, "1 step or more"), (4, 0, "needs 9 steps.*total_steps=8"), (1, 4, "4 are done")],
)
def test_a_run_too_short_for_a_profile_is_refused_before_any_work(make_config, steps, done, said):
    with pytest.raises(InputError, match=said):
        profiler.check(make_config(), done, steps)
    profiler.check(make_config(), 0, 3)


def test_the_command_refuses_a_profile_of_too_few_steps(tmp_path, capsys):
    argv = ["train", "--config=quickstart", f"--workdir={tmp_path / 'run'}", *SHRINK, "--profile"]
    assert cli.main(argv) == 2
    assert "--profile=5 needs 10 steps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scan", [False, True])
def test_the_products_of_a_profiled_run_are_those_of_its_model(tmp_path, monkeypatch, scan):
    use_one_device(monkeypatch)
    lines = []
    monkeypatch.setattr(logging.getLogger("vitjax"), "info", lambda *a: lines.append(a[0] % a[1:]))
    argv = ["train", "--config=quickstart", f"--workdir={tmp_path}", *SHRINK, "--profile=2"]
    argv += ["--config.total_steps=7", f"--config.model.scan={scan}", "--config.model.depth=2"]
    assert cli.main(argv) == 0
    found = json.loads((tmp_path / "profile" / "kernels.json").read_text())
    tokens, width, heads_out, mlp, depth, classes = 16, 16, 3 * 16, 16, 2, 10
    embed = tokens * 4 * width
    block = tokens * width * (heads_out + width + 2 * mlp) + 2 * tokens * tokens * width
    forward = 2 * 8 * (embed + depth * block + width * classes)
    expected = 3 * forward - 2 * 8 * embed  # no gradient of the images
    products = [k for k in found["kernels"] if k["kind"] == "matmul"]
    assert sum(k["flops"] for k in products) == expected
    assert sum(k["share"] for k in found["kernels"]) == pytest.approx(1.0)
    assert {k["calls"] for k in products} <= ({1.0, 2.0} if scan else {1.0})
    assert 0 < found["busy_ms"] <= found["step_ms"] * 1.05 and found["steps"] == 2
    assert any("Attention/Linear layers.py" in k["where"] for k in products)
    shown = "\n".join(lines)
    assert "x roofline" in shown and f"open {tmp_path / 'profile'} with XProf" in shown
    assert (tmp_path / "profile" / "kernels.md").exists()


def test_a_profile_changes_no_bit_of_a_run_also_where_it_goes_on(tmp_path, monkeypatch):
    use_one_device(monkeypatch)
    config = tiny_config(total_steps=9, eval_every=0, checkpoint_every=3)
    train_lib.train(config, tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "traced")
    for later in ("checkpoints/6", "checkpoints/9", "metrics.jsonl", "summary.json"):
        remove = shutil.rmtree if later[0] == "c" else os.remove
        remove(tmp_path / "traced" / later)
    rows = (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [row for row in rows if json.loads(row)["step"] <= 3]
    (tmp_path / "traced" / "metrics.jsonl").write_text("".join(kept))
    with pytest.raises(InputError, match="of which 3 are done"):
        train_lib.train(config, tmp_path / "traced", profile=2)
    train_lib.train(config, tmp_path / "traced", profile=1)
    assert (tmp_path / "traced" / "profile" / "kernels.json").exists()
    assert_same_run(tmp_path / "plain", tmp_path / "traced", 9)


def test_a_trace_ends_with_a_run_that_ends_early(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *args, **kwargs: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: ended.append(True))
    from vitjax.telemetry import Clock

    running = profiler.Profiler(tmp_path, 3, Clock())
    for _ in range(profiler.WARMUP + 1):
        running.after_step(None, {}, lambda: None)
    running.close()
    running.close()
    assert ended == [True]


def test_speeds_of_a_cpu_are_measured(monkeypatch):
    found = table.speeds(jax.devices()[0])
    assert found.flops > 1e8 and found.bandwidth > 1e8 and "measured" in found.origin
