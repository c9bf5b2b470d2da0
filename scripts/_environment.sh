# shellcheck shell=bash
# Sourced by scripts/quickstart and scripts/test. `environment EXTRA` makes sure that .venv, in the root of the
# repository, holds the package (editable) with that extra of pyproject.toml ("" for none); where that is so already,
# it does nothing. scripts/quickstart documents the variables it reads. Written for bash 3.2, which macOS has.
set -euo pipefail

caller=$PWD
this=$(printf '%q' "$0") # for messages
unset CDPATH
root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/fedsim-installed # written last: what an installation was for
unfinished=$venv/fedsim-unfinished # there from the making of .venv to the end of its first installation
log=$venv/fedsim-install.log

# Another active environment, or an installer's settings for other places, must not leak into this one.
unset VIRTUAL_ENV PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_ROOT UV_SYSTEM_PYTHON UV_PYTHON
export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$*" >&2; }

fail() { # fail CODE LINE...
  local code=$1
  shift
  printf '%s\n' "$@" >&2
  exit "$code"
}

# Any Python runs this, also 2.7. It answers in three lines: version, home, and "ok" or what is wrong with it.
# shellcheck disable=SC2016
description='
import os, platform, sys
problem = "ok"
if not (3, 11) <= tuple(sys.version_info[:2]) <= (3, 14):
    problem = "not 3.11 to 3.14"
elif platform.python_implementation() != "CPython":
    problem = platform.python_implementation() + ", not CPython"
elif "free-threading" in sys.version:
    problem = "a free-threaded build, which Ray does not support"
elif sys.platform == "darwin" and platform.machine() == "x86_64":
    problem = "for Intel Macs, which PyTorch no longer supports"
elif "make-venv" in sys.argv:
    try:
        import ensurepip, venv
    except ImportError:
        problem = "cannot make environments; on Debian and Ubuntu: sudo apt install python%d.%d-venv" % sys.version_info[:2]
print("%d.%d.%d" % tuple(sys.version_info[:3]))
print(os.path.realpath(getattr(sys, "base_prefix", sys.prefix)))
print(problem)
'

look_at() { # look_at PYTHON [make-venv]: runs it, sets version, home and problem, and is true where it fits
  local answer
  version='' home='' problem='does not run'
  if [ "$1" = /usr/bin/python3 ] && [ "$(uname -s)" = Darwin ] && ! xcode-select -p >/dev/null 2>&1; then
    return 1 # a stub: running it opens a window that offers Xcode
  fi
  answer=$(cd "$root" && "$1" -c "$description" "${2:-}" </dev/null 2>/dev/null) || return 1
  { read -r version && read -r home && read -r problem; } <<<"$answer" || return 1
  [ "$problem" = ok ]
}

candidates() { # the Pythons of this machine, one path a line, those with the best chance of wheels first
  local name
  for name in python3.13 python3.12 python3.11 python3.14 python3 python python3.15 python3.10 python3.9; do
    type -aP "$name" || true
  done
  if [ "$installer" = uv ]; then
    uv python find --managed-python --no-project '>=3.11,<3.15' 2>/dev/null || true
  fi
}

take_named() { # take_named [make-venv]: sets python, version and home to those of FEDSIM_PYTHON
  case $FEDSIM_PYTHON in
  /*) python=$FEDSIM_PYTHON ;;
  */*) python=$caller/$FEDSIM_PYTHON ;;
  *) python=$(type -P "$FEDSIM_PYTHON") || python=$FEDSIM_PYTHON ;;
  esac
  look_at "$python" "${1:-}" ||
    fail 2 "FEDSIM_PYTHON=$FEDSIM_PYTHON cannot be used: ${version:+Python $version, }$problem." \
      "Name a Python from 3.11 to 3.14, or leave FEDSIM_PYTHON out to have one looked for."
}

find_python() { # sets python, version and home
  local need='' found='' seen='' path
  [ "$installer" = uv ] || need=make-venv
  if [ -n "${FEDSIM_PYTHON:-}" ]; then
    take_named "$need"
    return
  fi
  while IFS= read -r path; do
    [ -n "$path" ] || continue
    python=$path
    if look_at "$python" "$need"; then return; fi
    case $seen in *"<$version $home>"*) continue ;; esac # the same one under another name
    [ -z "$home" ] || seen="$seen<$version $home>"
    found="$found"$'\n'"  $path: ${version:+Python $version, }$problem"
  done <<<"$(candidates)"
  fail 2 "fedsim needs a Python from 3.11 to 3.14, and found none that it can use. On the PATH:${found:- no Python.}" \
    "Install one (python.org, your package manager, or \`uv python install 3.13\`)," \
    "or name one that is not on the PATH: FEDSIM_PYTHON=/path/to/python $this"
}

usable() { # is .venv there, with a Python that fits, and the one that FEDSIM_PYTHON asks for? sets version and problem
  local asked=''
  if [ -n "${FEDSIM_PYTHON:-}" ]; then
    take_named
    asked="$version $home"
  fi
  look_at "$venv/bin/python" || return 1
  if [ -n "$asked" ] && [ "$asked" != "$version $home" ]; then
    problem="FEDSIM_PYTHON asks for another"
    return 1
  fi
}

stamped() { # stamped KEY: what the last installation wrote under it
  [ ! -f "$stamp" ] || sed -n "s/^$1: //p" "$stamp"
}

checksum() { cksum <"$root/pyproject.toml"; }

# Why the installer has to run, in words; nothing where .venv is as it should be.
reason() { # reason EXTRA
  if [ ! -f "$stamp" ]; then
    printf 'an environment that is there already'
  elif [ "$(stamped pyproject.toml)" != "$(checksum)" ]; then
    printf 'pyproject.toml has changed'
  elif [ "$(stamped python)" != "$version" ]; then
    printf 'its Python is now %s' "$version"
  elif [ "$(stamped folder)" != "$root" ]; then
    printf 'its folder was %s' "$(stamped folder)"
  elif [ -n "${FEDSIM_PIP_ARGS:-}" ] && [ "$(stamped arguments)" != "$FEDSIM_PIP_ARGS" ]; then
    printf 'FEDSIM_PIP_ARGS has changed'
  elif [ -n "$1" ] && [ "$(stamped extra)" != "$1" ]; then
    printf 'adding the %s extra, about 60 MB' "$1"
  fi
}

free_gb() { # free_gb FOLDER: whole GB free there, nothing where df does not say
  df -Pk "$1" 2>/dev/null |
    awk 'NR == 2 { for (i = 3; i <= NF; i++) if ($i ~ /%$/) { print int($(i - 1) * 1024 / 1e9); exit } }'
}

warn_if_full() { # warn_if_full FOLDER GB WHAT
  local free
  free=$(free_gb "$1") || true
  if [ -n "$free" ] && [ "$free" -lt "$2" ]; then
    say "Warning: $1 has $free GB free, and $3."
  fi
}

announce() { # what a whole installation costs, before it starts
  local temporary=${TMPDIR:-/tmp} needed=10 # measured with pip, which keeps the downloads until it has unpacked them
  [ "$installer" = pip ] || needed=8
  if [ "$(uname -s)" = Darwin ]; then
    say "  Downloads about 0.3 GB (PyTorch, Ray) and takes some 1.5 GB of disk: a few minutes, once."
    warn_if_full "$root" 3 "this needs up to 3 while it installs"
  elif [ -n "${FEDSIM_PIP_ARGS:-}" ]; then
    say "  Downloads up to 3.2 GB (PyTorch with CUDA, Ray; less without CUDA) and takes up to 6.5 GB of disk:" \
      "2 to 10 minutes, once."
    warn_if_full "$root" 3 "this needs 3 with CPU-only PyTorch, $needed with CUDA"
  else
    say "  Downloads about 3.2 GB (PyTorch with CUDA, Ray) and takes 6.5 GB of disk: 2 to 10 minutes, once."
    warn_if_full "$root" "$needed" "this needs up to $needed while it installs; CPU-only PyTorch needs 3: $cpu_only"
    [ "$installer" = uv ] ||
      warn_if_full "$temporary" 4 "pip keeps 3.2 GB there meanwhile; TMPDIR=/a/larger/folder moves that"
  fi
}

make_venv() {
  local output
  if [ -d "$venv" ]; then rm -rf "$venv"; fi
  if [ "$installer" = uv ]; then
    output=$(uv venv --seed --python "$python" "$venv" </dev/null 2>&1)
  else
    output=$("$python" -m venv "$venv" </dev/null 2>&1)
  fi || fail 1 "$output" "Making $venv with $python failed." "${advice[@]}"
  touch "$unfinished"
}

install() { # install EXTRA: its progress shows on a terminal; elsewhere its last lines do, if it fails
  local extra=$1 code=0 command arguments
  if [ "$installer" = uv ]; then
    command=(uv pip install --python "$venv/bin/python")
  else
    command=("$venv/bin/python" -m pip install)
    [ -t 2 ] || command+=(--progress-bar off)
  fi
  read -r -a arguments <<<"${FEDSIM_PIP_ARGS:-}"
  command+=(${arguments[@]+"${arguments[@]}"} --editable ".${extra:+[$extra]}")
  cd "$root"
  rm -f "$stamp"
  trap 'say "Interrupted. Run it again to go on: finished downloads are kept."; exit 130' INT
  if [ -t 2 ]; then
    "${command[@]}" </dev/null >&2 || code=$?
  else
    "${command[@]}" </dev/null >"$log" 2>&1 || code=$?
    [ "$code" = 0 ] || { tail -n 20 "$log" && printf 'The whole of it: %s\n' "$log"; } >&2
  fi
  trap - INT
  [ "$code" = 0 ] || fail 1 "" "The installation failed: $installer ended with $code." "${advice[@]}"
  printf '%s: %s\n' pyproject.toml "$(checksum)" python "$version" folder "$root" \
    extra "$extra" arguments "${FEDSIM_PIP_ARGS:-}" >"$stamp"
  rm -f "$unfinished"
}

environment() { # environment EXTRA
  local extra=$1 keep=yes why started=$SECONDS
  case $(uname -s) in
  Linux | Darwin) ;;
  *) fail 2 "fedsim runs on Linux and macOS; on Windows, inside WSL." ;;
  esac
  installer=pip
  cpu_only="FEDSIM_PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'"
  if [ "${FEDSIM_INSTALLER:-uv}" = uv ] && type -P uv >/dev/null; then
    installer=uv
    cpu_only="FEDSIM_PIP_ARGS='--torch-backend cpu'"
  fi
  advice=("What to try:"
    "  $this again: finished downloads are kept"
    "  CPU-only PyTorch, a much smaller download: $cpu_only $this"
    "  another Python: FEDSIM_PYTHON=/path/to/python $this")
  [ "$installer" = pip ] || advice+=("  pip instead of uv: FEDSIM_INSTALLER=pip $this")

  if [ -e "$venv" ] || [ -L "$venv" ]; then
    # Only an environment, or folders without a file in them (a creation cut short), may be replaced.
    if [ ! -f "$venv/pyvenv.cfg" ] && { [ ! -d "$venv" ] || [ -n "$(find "$venv/" ! -type d | head -n 1)" ]; }; then
      fail 2 "$venv is in the way: it is no virtual environment (no pyvenv.cfg). Move it away and try again."
    fi
    if [ -f "$unfinished" ]; then
      keep=no problem="an earlier installation did not finish"
    elif usable; then
      why=$(reason "$extra")
      [ -n "$why" ] || return 0
      if [ "$installer" = pip ] && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        keep=no problem="it has no working pip"
      fi
    else
      keep=no problem="its Python ${version:+is $version, }$problem"
    fi
    [ "$keep" = yes ] || why="made anew, $problem"
  else
    keep=no why="new"
  fi
  # A later quickstart keeps what scripts/test has added.
  [ -n "$extra" ] || extra=$(stamped extra)

  if [ "$keep" = yes ]; then
    say "Installing fedsim into .venv with $installer ($why)."
    [ -f "$stamp" ] || announce
  else
    find_python
    say "Installing fedsim into .venv ($why) with $installer and Python $version ($python)."
    announce
    make_venv
  fi
  install "$extra"
  say "Installed in $((SECONDS - started)) s."
}
