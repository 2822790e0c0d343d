"""The benchmarks: the list of cases, the check before the timing, the command and its files."""

import json
import re
import time

import pytest
import torch

import fused
from fused.__main__ import main
from fused._report.text import count, duration, table, three_digits
from fused.bench import attention_cases, command, measure, optim_cases, results
from fused.bench import cases as case_list
from fused.bench.case import Case, Workbench, forward_backward
from fused.bench.measure import check, interleave, main_kernel, run_case

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def small_case(build, name="double", dtype=torch.float32):
    return Case("attention", name, dtype, build, work=2e9, unit="GFLOP/s", quick=True)


def doubling(bench: Workbench, broken=lambda layers: False):
    """A case whose fused result is off where ``broken`` says so. Its products outweigh all else."""
    x = bench.tensor(192, 192, requires_grad=True)
    grad = bench.tensor(192, 192)
    run = forward_backward(bench.function(lambda: x @ x), [x], grad)
    return lambda: [out + 1e-3 * broken(bench.layers) for out in run()]


@pytest.fixture
def two_cases(monkeypatch):
    """The command on cases that take microseconds."""
    chosen = [small_case(doubling, f"double {size}") for size in ("once", "twice")]
    monkeypatch.setattr(command, "all_cases", lambda: chosen)
    monkeypatch.setattr(command, "_QUICK_SECONDS", 0.001)


# Cases


def test_case_names_are_unique_and_cover_every_op():
    cases = case_list.all_cases()
    assert len({str(case) for case in cases}) == len(cases)
    for op in case_list.OPS:
        assert any(case.quick for case in case_list.cases(op))
        assert any("bwd" in str(case) for case in case_list.cases(op)) or op == "optim"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contenders_start_from_the_same_values(dtype):
    benches = [Workbench(name, CPU, dtype) for name in ("stock", "fused")]
    benches.append(Workbench("stock", CPU, dtype, exact=True))
    made = []
    for bench in benches:
        layer = bench.module(lambda: torch.nn.Linear(5, 3))
        made.append([bench.tensor(4, 7), *layer.parameters(), bench.tensor(2, scale=0.1)])
    stock, twin, exact = made
    for one, other, truth in zip(stock, twin, exact, strict=True):
        assert one.dtype == dtype and truth.dtype == torch.float64
        assert torch.equal(one, other) and torch.equal(one.double(), truth)


SMALL = {
    "attention": lambda: attention_cases._attention(1, 16, mask="boolean", backward=True),
    "window": lambda: attention_cases._attention(1, 16, mask="window", backward=True),
    "additive": lambda: attention_cases._attention(1, 16, mask="additive"),
    "decode": lambda: attention_cases._attention(1, 1, keys=16),
    "attention module": lambda: attention_cases._module(1, 4, 16, backward=True),
    "rotary": lambda: attention_cases._rotary(1, 16, interleaved=True, backward=True),
    "conv": lambda: case_list._conv((1, 4, 8, 8), 4, 3, layout="NHWC", backward=True),
    "depthwise": lambda: case_list._conv((1, 4, 8), 4, 3, depthwise=True, backward=True),
    "lstm_cell": lambda: case_list._lstm_cell(2, 8, backward=True),
    "lstm": lambda: case_list._lstm(3, 2, 8, num_layers=2, bidirectional=True, backward=True),
    "optim": lambda: optim_cases.step_case("AdamW", (2, (5,)), "fused", clip=True),
    "master": lambda: optim_cases.master_case((2, (5,))),
    "clip_grad_norm_": lambda: optim_cases.clip_case((2, (5,))),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_kind_of_case_is_right(name):
    assert check(SMALL[name](), CPU) is None


def test_a_wrong_result_is_found():
    wrong = check(small_case(lambda b: doubling(b, lambda layers: layers == "fused")), CPU)
    assert re.match(r"result 0: error 0.00[\d.]+ is above", wrong)


# Timing


def test_interleave_takes_turns():
    turns = []
    runs = {name: lambda name=name: (turns.append(name), time.sleep(0.03)) for name in "abc"}
    timings = interleave(runs, CPU, seconds=0.0)
    assert "".join(turns[6:21]) == "abcbcacababcbca"  # after each one's first and trial call
    assert all(len(timing.rounds) == 5 for timing in timings.values())
    assert all(0.03 <= timing.median < 0.3 for timing in timings.values())


def test_interleave_repeats_short_calls():
    calls = []
    timing = interleave({"short": lambda: calls.append(0)}, CPU, seconds=0.0)["short"]
    assert len(calls) > 1000 and timing.median < 1e-4


def test_main_kernel_names_the_operator():
    x = torch.randn(256, 256)
    assert main_kernel(lambda: (x @ x).relu(), CPU) == "mm"


def test_result_compares_round_by_round():
    result = run_case(small_case(doubling), CPU, 0.001)
    assert len(result.ratios()) == len(result.timings["stock"].rounds) >= 5
    assert result.rate("stock") == pytest.approx(2 / result.timings["stock"].median)
    assert result.wrong is None and result.stock_kernel == "mm"


@pytest.mark.parametrize(
    ("case", "threshold", "unit"),
    [
        (optim_cases.step_case("SGD", (2, (4096,)), "fused"), "_LARGE_BYTES", "memory"),
        (small_case(doubling), "_LARGE_OPERATIONS", "torch.mm"),
        (small_case(doubling, dtype=torch.bfloat16), "_LARGE_OPERATIONS", "torch.mm"),
    ],
    ids=["memory", "products", "products in bfloat16"],
)
def test_large_work_is_compared_with_what_the_machine_reaches(monkeypatch, case, threshold, unit):
    monkeypatch.setattr(measure, "_PRODUCT_SIZE", {"cpu": 64})
    monkeypatch.setattr(measure, threshold, case.work + 1)
    assert run_case(case, CPU, 0.001).machine_rate is None  # of small work it says nothing
    monkeypatch.setattr(measure, threshold, 1 << 17)
    result = run_case(case, CPU, 0.001)
    assert result.machine_rate > 0 and set(result.timings) == {"stock", "fused"}
    share = f"{result.rate('fused') / result.machine_rate:.0%}"
    assert any(f"({share} of {unit})" in cell for cell in results.row(result, compiled=False))
    assert results.as_data(result)["machine_rate"] == result.machine_rate


def test_the_machine_is_measured_by_its_faster_product(monkeypatch):
    """On some CPUs that is float32's, also for bfloat16."""
    seconds = {torch.bfloat16: 2.0, torch.float32: 0.5}
    monkeypatch.setattr(
        measure,
        "interleave",
        lambda runs, *_: {name: measure.Timing((seconds.get(name, 1.0),)) for name in runs},
    )
    result = run_case(small_case(doubling, dtype=torch.bfloat16), CPU, 0.001)
    size = measure._PRODUCT_SIZE["cpu"]
    assert result.machine_rate == pytest.approx(2 * size**3 / 0.5 / 1e9)


# Command


def bench(*arguments):
    return main(["bench", *map(str, arguments)])


def test_command_writes_json_and_report(two_cases, tmp_path, capsys):
    json_path, page_path = tmp_path / "new" / "bench.json", tmp_path / "bench.html"
    assert bench("--quick", "--json", json_path, "--report", page_path) == 0
    printed = capsys.readouterr().out
    assert re.search(r"f32 double once +[\d.]+ .s +[\d.]+ .s +[\d.]+x +.* GFLOP/s .*mm\n", printed)
    assert "2 cases" in printed and torch.__version__ in printed

    content = json.loads(json_path.read_text())
    assert content["environment"]["fused"] == fused.__version__
    assert [case["case"] for case in content["cases"]] == ["f32 double once", "f32 double twice"]
    for case in content["cases"]:
        assert case["ratio_quartiles"][0] <= case["ratio"] <= case["ratio_quartiles"][1]
        assert case["wrong"] is None and case["seconds"].keys() == {"stock", "fused"}

    page = page_path.read_text()
    assert page.count("data:image/svg+xml;base64,") == 1 and "f32 double twice" in page
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)""", page)
    assert all(source.startswith("data:") for source, _ in links)  # nothing is fetched


def test_command_fails_on_a_wrong_result(two_cases, monkeypatch, capsys):
    broken = small_case(lambda b: doubling(b, lambda layers: layers == "fused"))
    monkeypatch.setattr(command, "all_cases", lambda: [broken])
    assert bench("--quick") == 1
    captured = capsys.readouterr()
    assert "WRONG" in captured.out
    assert captured.err.startswith("fused bench: f32 double is wrong: result 0: error")


def test_compiled_column(two_cases, monkeypatch, capsys):
    # The eager backend: what is tested is the column, not the compiler.
    compiled = []

    def compile(function):
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    assert bench("--quick", "--compile", "--match", "once") == 0
    assert len(compiled) == 1
    header, _, row = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert re.match(r"case +stock +fused +ratio +compiled +its ratio", header)
    assert len(re.findall(r"[\d.]+x", row)) == 2


def test_a_failing_compiler_is_reported(two_cases, monkeypatch, capsys):
    def refuse():
        raise NotImplementedError("no such graph\nmore")

    monkeypatch.setattr(torch, "compile", lambda function: refuse)
    assert bench("--quick", "--compile", "--match", "once") == 0
    printed = capsys.readouterr().out
    assert "compiled failed: f32 double once: NotImplementedError: no such graph\n" in printed


def test_list(capsys):
    assert bench("optim", "--list", "--match", "SGD") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and all("SGD" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convolution",), "OP must be one of attention, conv, lstm, optim, got 'convolution'"),
        (("--match", "nothing like it"), "--match: no case's name contains 'nothing like it'"),
        (("--device", "cuda:99"), "--device cuda:99: "),
        (("--json", "."), ".: is a folder, must be a file to write"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert bench(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fused bench: {message}") and error.count("\n") == 1


# Numbers and tables


def test_numbers_for_people():
    assert [duration(s) for s in (1.5e-8, 2.34e-5, 0.01, 0.1234, 62.0)] == [
        "15.0 ns", "23.4 µs", "10.0 ms", "123 ms", "62.0 s",
    ]  # fmt: skip
    assert [three_digits(v) for v in (0.123, 9.996, 99.96, 1234)] == ["0.12", "10.0", "100", "1234"]
    assert [count(v) for v in (12.34, 999, 1234, 102_345, 1_234_567)] == [
        "12.3", "999", "1,230", "102,000", "1,230,000",
    ]  # fmt: skip


def test_table_is_aligned():
    lines = table(("name", "n"), [["a", "10"], ["long name", "5"]], left=1).splitlines()
    assert lines == ["name        n", "---------  --", "a          10", "long name   5"]
