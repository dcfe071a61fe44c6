#!/usr/bin/env bash
# Write requirements-dev.lock: the exact versions of everything that `pip install .[dev]` brings to a fresh environment.
# Names and versions alone (no index, no path, no local label such as +cpu), so that the file holds on every machine.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/env"
pip="$work/env/bin/python -m pip"
$pip install --quiet --upgrade pip
$pip install --quiet "${TORCH:-$(grep '^torch==' requirements-dev.lock 2> /dev/null || echo torch)}"
$pip install --quiet --editable '.[dev]'
{
  echo "# Made by \`make lock\`. The development environment is installed with these versions as constraints."
  $pip freeze --exclude-editable | sed -E 's/^([A-Za-z0-9._-]+==[^+ ]+).*/\1/' | grep -E '^[A-Za-z0-9._-]+==' | grep -v '^nvidia-'
} > "$work/lock"
mv "$work/lock" requirements-dev.lock
