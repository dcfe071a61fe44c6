#!/usr/bin/env bash
# Run the tests in environments with the lowest, the locked and the highest supported torch and Transformers.
#
#   scripts/test_matrix.sh [lowest] [locked] [highest]     all three by default
#
# TIER: what pytest -m selects ("fast" by default; "" for all). MATRIX: where the environments go (.venv-matrix).
# PYTHON: the interpreter that makes them. An environment that stands is kept; remove it to have it made again.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
MATRIX=${MATRIX:-.venv-matrix}
TIER=${TIER-fast}

# The ends of the ranges in pyproject.toml; torch comes first and alone, so that the build that is found first stays.
torch_of() {
  case $1 in
    lowest) "$PYTHON" scripts/bounds.py lowest torch ;;
    locked) grep '^torch==' requirements-dev.lock ;;
    highest) "$PYTHON" scripts/bounds.py range torch ;;
    *) echo "no environment $1: lowest, locked and highest are known" >&2; return 2 ;;
  esac
}

install() {
  local name=$1 torch
  local pip="$MATRIX/$name/bin/python -m pip install --quiet"
  torch=$(torch_of "$name")
  "$PYTHON" -m venv "$MATRIX/$name"
  $pip --upgrade pip
  $pip "$torch"
  case $name in
    lowest) $pip "$torch" "$("$PYTHON" scripts/bounds.py lowest transformers)" --editable '.[dev]' ;;
    locked) $pip --constraint requirements-dev.lock --editable '.[dev]' ;;
    highest) $pip --upgrade --upgrade-strategy eager --editable '.[dev]' ;;
  esac
  touch "$MATRIX/$name/.installed"
}

[ $# -gt 0 ] || set -- lowest locked highest
for environment; do
  [ -e "$MATRIX/$environment/.installed" ] || install "$environment"
  echo "== $environment: $("$MATRIX/$environment/bin/python" -c '
import torch, transformers
print(f"torch {torch.__version__}, transformers {transformers.__version__}")')"
  "$MATRIX/$environment/bin/python" -m pytest -n 2 --dist loadfile -m "$TIER"
done
