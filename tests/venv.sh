# To be sourced: makes .venv in the project's folder, goes there, and offers `install`.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "Python 3.10 or newer is needed as python3; this is $(python3 --version 2>&1)." >&2
  exit 1
}
[ -x .venv/bin/python ] || python3 -m venv .venv
PATH="$PWD/.venv/bin:$PATH"

# install <pip's arguments>: once for each state of the files of requirements
install() {
  local done_for=".venv/installed-$(cat requirements.txt tests/requirements*.txt | cksum | cut -d' ' -f1)-$(printf '%s' "$*" | cksum | cut -d' ' -f1)"
  [ -e "$done_for" ] || { python -m pip install --quiet --disable-pip-version-check "$@" && touch "$done_for"; }
}
