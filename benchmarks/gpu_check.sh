#!/usr/bin/env bash
# Everything that needs a GPU, from a clean tree and without a network:
#
#   benchmarks/gpu_check.sh                      all parts, one after the other
#   benchmarks/gpu_check.sh build tests          some of them, where one command may take ten minutes
#
# Parts: build, tests, memcheck, racecheck, synccheck, bench, report. Uses the machine's own torch,
# nvcc, ninja, pybind11 and pytest; what needs another package that is not there is listed as not
# run. Each part leaves its findings in build/gpu_check; report gathers them in
# benchmarks/results/<gpu>.json, from which the README's figures come.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
work=$root/build/gpu_check
python=${PYTHON:-python3}
part_seconds=${PART_SECONDS:-570}
mkdir -p "$work"

failed=0
part() {
  local name=$1 began=$SECONDS
  shift
  echo "=== $name"
  timeout "$part_seconds" "$@"
  local status=$?
  "$python" benchmarks/gpu_findings.py note "$name" "$status" $((SECONDS - began))
  case $status in
    0) echo "=== $name: passed in $((SECONDS - began)) s" ;;
    127) echo "=== $name: not run" ;;
    *) failed=1 && echo "=== $name: FAILED with status $status after $((SECONDS - began)) s" ;;
  esac
}

build() { "$python" -m pip install -q --no-build-isolation --no-index --force-reinstall --no-deps .; }

# The tests see the installed package: the tree's own `fused`, which has no libraries, stays out.
tree_without_package() {
  mkdir -p "$work/tree"
  for name in tests build_support csrc benchmarks pyproject.toml setup.py README.md docs Makefile; do
    [[ ! -e $root/$name ]] || ln -sfn "$root/$name" "$work/tree/$name"
  done
  cd "$work/tree" || exit 1
}

ignored_tests() { "$python" "$root/benchmarks/gpu_findings.py" ignored; }

tests() {
  tree_without_package
  # shellcheck disable=SC2046  # one --ignore for each word
  "$python" -m pytest -q $(ignored_tests) --junitxml="$work/tests.xml" tests
}

# The kernel tests alone, small cases first; every kernel is in them. Without torch's cache each
# tensor is an allocation of its own, with unmapped memory around it.
sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here" && return 127; }
  tree_without_package
  # shellcheck disable=SC2046
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$python" -m pytest -q -x $(ignored_tests) -k "cuda and float32" \
    tests/test_attention.py tests/test_conv.py tests/test_lstm.py tests/test_optim.py
}

bench() {
  tree_without_package
  "$python" -m fused bench --device cuda --json "$work/bench.json"
}

report() { "$python" "$root/benchmarks/gpu_findings.py" report; }

export -f build tree_without_package ignored_tests tests sanitize bench report
export root work python
for name in "${@:-all}"; do
  case $name in
    all)
      for each in build tests; do part $each bash -c $each; done
      for tool in memcheck racecheck synccheck; do part $tool bash -c "sanitize $tool"; done
      for each in bench report; do part $each bash -c $each; done
      ;;
    memcheck | racecheck | synccheck) part "$name" bash -c "sanitize $name" ;;
    build | tests | bench | report) part "$name" bash -c "$name" ;;
    *) echo "gpu_check: part must be build, tests, memcheck, racecheck, synccheck, bench or report," \
      "got $name" && exit 2 ;;
  esac
done
exit $failed
