#!/usr/bin/env bash
# Build the wheel, install it in an empty environment and use it there as a stranger would: the command's help, an import
# of every module that needs no extra, and a tiny decode. Nothing of the source tree is on the path.
#
# PYTHON: the interpreter that makes the environments. WHEEL_WORK: a folder to keep; a temporary one by default.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if [ -n "${WHEEL_WORK:-}" ]; then
  work=$WHEEL_WORK
  mkdir -p "$work"
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi

# A build in place would pack what an earlier build left behind in build/.
rm -rf "$work/source" "$work/dist"
mkdir -p "$work/source"
cp -r pyproject.toml README.md LICENSE src "$work/source"
find "$work/source" -name '__pycache__' -o -name '*.egg-info' | xargs rm -rf
"$PYTHON" -m venv --clear "$work/env"
"$work/env/bin/python" -m pip install --quiet --upgrade pip
"$work/env/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$work/dist" "$work/source"
rm -rf "$work/source"
wheel=$(ls "$work"/dist/telltale-*.whl)

"$PYTHON" scripts/check_wheel_content.py "$wheel"
"$work/env/bin/python" -m pip install --quiet "$(grep -h '^torch==' requirements-dev.lock)"
"$work/env/bin/python" -m pip install --quiet --constraint requirements-dev.lock "$wheel"
cp scripts/check_installed.py "$work"
cd "$work"
"$work/env/bin/telltale" --help > /dev/null
"$work/env/bin/python" -I check_installed.py
echo "$(basename "$wheel"): installed, imported and used"
