"""The compiler report reads ptxas and nvdisasm as they print, and complains of what got worse."""

from __future__ import annotations

import pytest

from build_support import kernel_report
from build_support.kernels import find_kernels, kernels_in

PTXAS = """\
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90a'
ptxas info    : Function properties for _Z1fv
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 8 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z1gv' for 'sm_90a'
ptxas info    : Function properties for _Z1gv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers
"""

# One spill before the loop and two in it; the branch to itself is how a kernel ends.
MACHINE_CODE = """\
\t.section\t.text._Z1fv,"ax",@progbits
\t.sectioninfo\t@"SHI_REGISTERS=128"
_Z1fv:
        /*0000*/                   STL [R1], R2 ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR14][R16.64] ;
        /*0020*/              @!P0 LDL R2, [R1] ;
        /*0030*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0040*/                   STL [R1], R2 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
        /*0060*/                   LDG.E.64 R4, desc[UR14][R16.64] ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
\t.section\t.text._Z1gv,"ax",@progbits
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR14][R16.64] ;
"""

TABLE = """\
# a comment
kernel  registers  stack  spills  local_in_loops  wide_loads  tensor
f             128      8      28               2           1       1
"""


def test_kernels_are_found_in_source() -> None:
    source = """
    // A __global__ void comment_kernel(int) {}
    template <typename T>
    __global__ void __launch_bounds__(Traits<T>::kThreads(), 2)
        first_kernel(const Params p) {}
    static __global__ void second_kernel() {
    }
    template <int N> __global__ void declared_kernel(int);
    """
    assert kernels_in(source) == ["first_kernel", "second_kernel"]
    assert find_kernels()["attention_forward_kernel"] == "csrc/attention/attention_forward.cu"


def test_ptxas_report_is_read() -> None:
    assert kernel_report.parse_ptxas(PTXAS) == {
        "_Z1fv": {"registers": 128, "stack": 8, "spills": 28},
        "_Z1gv": {"registers": 8, "stack": 0, "spills": 0},
    }


def test_machine_code_is_read() -> None:
    assert kernel_report.parse_machine_code(MACHINE_CODE) == {
        "_Z1fv": {"local_in_loops": 2, "wide_loads": 1, "tensor": 1},
        "_Z1gv": {"local_in_loops": 0, "wide_loads": 1, "tensor": 0},
    }


def test_only_what_is_worse_than_the_table_is_complained_of() -> None:
    expected = kernel_report.read_table(TABLE)
    assert kernel_report.compare({"f": dict(expected["f"])}, expected) == []
    better = {"registers": 96, "stack": 0, "spills": 0, "wide_loads": 2}
    assert kernel_report.compare({"f": better}, expected) == []
    worse = {"registers": 129, "wide_loads": 0}
    assert kernel_report.compare({"f": worse, "g": {}}, expected) == [
        "g: is not in the table",
        "f: registers must be at most 128, got 129",
        "f: wide_loads must be at least 1, got 0",
    ]
    # Figures that nobody had nvdisasm for are no limits.
    unknown = kernel_report.read_table(TABLE.replace("28               2", "28               -"))
    assert kernel_report.compare({"f": expected["f"] | {"local_in_loops": 9}}, unknown) == []
    assert kernel_report.compare({}, expected) == ["f: is in the table alone"]


def instance(signature: str, architecture: str, **figures: int) -> kernel_report.Instance:
    return kernel_report.Instance("f", signature, architecture, figures)


def test_wide_loads_that_one_instance_loses_show_in_the_sum() -> None:
    instances = [
        instance("f<float>", "sm_80", registers=40, wide_loads=4),
        instance("f<float>", "sm_120", registers=44, wide_loads=3),
        instance("f<Half>", "sm_80", registers=32, wide_loads=2),
        instance("f<char>", "sm_80", registers=32, wide_loads=0),
    ]
    assert kernel_report.worst(instances) == {"f": {"registers": 44, "wide_loads": 5}}
    instances[2].figures["wide_loads"] = 0
    assert kernel_report.worst(instances) == {"f": {"registers": 44, "wide_loads": 3}}


def test_local_memory_needs_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, local = {"f": {"stack": 0, "spills": 0}}, {"f": {"stack": 8, "spills": 0}}
    assert kernel_report.unexplained(clean) == []
    text = "f: touches local memory, and no reason is given"
    assert kernel_report.unexplained(local) == [text]
    monkeypatch.setattr(kernel_report, "LOCAL_MEMORY_BECAUSE", {"f": "a table in local memory"})
    assert kernel_report.unexplained(local) == []
    text = "f: touches no local memory, for which a reason is given"
    assert kernel_report.unexplained(clean) == [text]
