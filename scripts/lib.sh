# Sourced by the other scripts: messages, the choice of Python, and uv.

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# uv reads only its own variables: hand it what pip was told about local wheels, the index and certificates.
export_wheel_sources() {
  local links="${UV_FIND_LINKS:-}" folder
  for folder in ${PIP_FIND_LINKS:-}; do links="${links:+$links,}$folder"; done
  [ -z "$links" ] || export UV_FIND_LINKS="$links"
  [ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
  [ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"
  export DS_BUILD_OPS=0 UV_PYTHON_PREFERENCE="${UV_PYTHON_PREFERENCE:-system}" UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}"
}

works() { "$1" -c 'import sys' >/dev/null 2>&1; }  # a shim on PATH may stand for a version that is not active
supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }

# Sets UV: the one on PATH if it is recent enough, else one of our own in .uv/, which touches nothing outside the checkout.
find_uv() {
  local python candidate
  for candidate in .uv/bin/uv uv; do
    if "$candidate" venv --help 2>/dev/null | grep -q -- --clear; then UV="$candidate"; return; fi
  done
  for candidate in python3 python3.12 python3.11; do if works "$candidate"; then python="$candidate"; break; fi; done
  [ -n "${python:-}" ] || die "no Python found; install Python 3.11 or 3.12 (sudo apt-get install python3 python3-venv) and run this again"
  say "getting uv into .uv/"
  rm -rf .uv
  # Debian splits ensurepip off its Python, so the first way may be closed; the second needs pip, but no venv module.
  if "$python" -m venv .uv >/dev/null 2>&1; then
    .uv/bin/python -m pip install -q uv || die "could not download uv (pip's message is above); check the network and run this again"
  elif "$python" -m pip --version >/dev/null 2>&1; then
    rm -rf .uv
    "$python" -m pip install -q --target .uv uv || die "could not download uv (pip's message is above); check the network and run this again"
  else
    rm -rf .uv
    die "uv is missing, and this Python has neither venv nor pip to get it with: sudo apt-get install python3-venv, then run this again"
  fi
  UV=.uv/bin/uv
}
