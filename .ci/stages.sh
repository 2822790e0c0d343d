# Sourced by run and full: `stage NAME COMMAND...` runs a command under a heading and prints its
# time; the first that fails ends the script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

stage() {
  local name=$1 began=$SECONDS
  shift
  echo
  echo "=== $name: $*"
  "$@" || { echo "=== $name: FAILED after $((SECONDS - began)) s" && exit 1; }
  echo "=== $name: passed in $((SECONDS - began)) s ($SECONDS s in all)"
}

# A virtual environment of this run's own, active from here on, and gone with it.
fresh_environment() {
  local folder
  folder=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder of now
  trap "rm -rf '$folder'" EXIT
  "${PYTHON:-python3}" -m venv "$folder/env"
  unset CONDA_PREFIX
  export VIRTUAL_ENV="$folder/env" PATH="$folder/env/bin:$PATH"
}
