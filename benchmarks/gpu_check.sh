#!/usr/bin/env bash
# Everything that needs a GPU, from a clean tree and without a network:
#
#   benchmarks/gpu_check.sh                      all parts, one after the other
#   benchmarks/gpu_check.sh build tests          some of them, where one command may take ten minutes
#
# Parts: build, tests, memcheck, racecheck, synccheck, bench, report; and tests-cuda, memcheck-rotary
# or bench-lstm, say, for the tests on the GPU, one file of kernel tests or one op of it, each with
# ten minutes of its own. Uses the machine's own torch, nvcc, ninja, pybind11 and pytest, and
# pytest-xdist where it is; what needs another package that is not there is listed as not run. Each
# part leaves its findings in build/gpu_check, which build empties; report gathers them in
# benchmarks/results/<gpu>.json, from which the README's figures come.
# shellcheck disable=SC2329  # functions that `bash -c` calls
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
root=$PWD
work=$root/build/gpu_check
python=${PYTHON:-python3}
part_seconds=${PART_SECONDS:-570}
ops=(attention conv lstm optim)
# Of tests/test_<name>.py; together they launch every kernel.
kernel_tests=(attention attention_few_queries attention_tangent attention_tensor_cores conv
  conv_tensor_cores lstm optim optim_norm optim_table rotary)

failed=0
part() {
  local name=$1 began=$SECONDS
  echo "=== $name"
  # memcheck-conv is the function memcheck with the argument conv. pytest that is interrupted still
  # writes down what it has run.
  timeout --signal=INT --kill-after=20 "$part_seconds" bash -c "${name/-/ }"
  local status=$?
  mkdir -p "$work"
  "$python" benchmarks/gpu_findings.py note "$name" "$status" $((SECONDS - began))
  case $status in
    0) echo "=== $name: passed in $((SECONDS - began)) s" ;;
    127) echo "=== $name: not run" ;;
    *) failed=1 && echo "=== $name: FAILED with status $status after $((SECONDS - began)) s" ;;
  esac
}

# With the CUDA kernels or not at all. What an earlier build was found to do is of no use any more.
build() {
  rm -rf "$work"
  FUSED_CUDA=1 "$python" -m pip install -q --no-build-isolation --no-index --force-reinstall \
    --no-deps .
}

# The tests see the installed package: the tree's own `fused`, which has no libraries, stays out.
tree_without_package() {
  mkdir -p "$work/tree"
  for name in tests build_support csrc benchmarks pyproject.toml setup.py README.md docs Makefile; do
    [[ ! -e $root/$name ]] || ln -sfn "$root/$name" "$work/tree/$name"
  done
  cd "$work/tree" || exit 1
}

ignored_tests() { "$python" "$root/benchmarks/gpu_findings.py" ignored; }

# Those on the GPU, one after the other; and the others, of which several processes can run a share.
tests() {
  tree_without_package
  local wanted=cuda share=()
  if [[ $1 == others ]]; then
    wanted="not cuda"
    "$python" -c 'import xdist' 2>/dev/null && share=(-n 8) && export OMP_NUM_THREADS=2
  fi
  # shellcheck disable=SC2046  # one --ignore for each word
  "$python" -m pytest -q "${share[@]}" $(ignored_tests) -k "$wanted" \
    --junitxml="$work/tests-$1.xml" tests
}

# One file of kernel tests, in one dtype where they have each case in all. Without torch's cache each
# tensor is an allocation of its own, with unmapped memory around it.
sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here" && return 127; }
  tree_without_package
  local wanted="cuda and float32"
  case $2 in attention_* | conv_* | optim_*) wanted=cuda ;; esac
  # shellcheck disable=SC2046
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$python" -m pytest -q -x $(ignored_tests) -k "$wanted" "tests/test_$2.py"
}
memcheck() { sanitize memcheck "$1"; }
racecheck() { sanitize racecheck "$1"; }
synccheck() { sanitize synccheck "$1"; }

bench() {
  tree_without_package
  "$python" -m fused bench "$1" --device cuda --json "$work/$1.bench.json"
}

report() { "$python" "$root/benchmarks/gpu_findings.py" report; }

parts_of() {
  local each
  case $1 in
    all) for each in build tests memcheck racecheck synccheck bench report; do parts_of $each; done ;;
    build | report) echo "$1" ;;
    tests) printf "tests-%s\n" cuda others ;;
    memcheck | racecheck | synccheck) printf "$1-%s\n" "${kernel_tests[@]}" ;;
    bench) printf "$1-%s\n" "${ops[@]}" ;;
    *)
      for each in tests memcheck racecheck synccheck bench; do parts_of $each; done |
        grep -Fx -- "$1" && return
      echo "gpu_check: part must be build, tests, memcheck, racecheck, synccheck, bench or report," \
        "or one of these with a name behind it (tests-cuda, memcheck-rotary, bench-lstm), got $1" >&2
      return 1
      ;;
  esac
}

export -f build tree_without_package ignored_tests tests sanitize memcheck racecheck synccheck \
  bench report
export root work python
names=$(for name in "${@:-all}"; do parts_of "$name" || exit 1; done) || exit 2
for name in $names; do part "$name"; done
exit $failed
