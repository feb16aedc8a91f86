# shellcheck shell=bash
# Sourced from the repository root by demo.sh and test.sh: `source launch/venv.sh EXTRA` makes .venv if
# there is none, installs this checkout with that extra, and puts it first on the PATH.
python_is_new() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# A set-up that was interrupted has a .venv without pip: made again in place.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  PYTHON=${PYTHON:-python3}
  if ! python_is_new "$PYTHON"; then
    echo "error: '$PYTHON' is not Python 3.11 or newer; set PYTHON=/path/to/python3" >&2
    exit 1
  fi
  "$PYTHON" -m venv .venv
fi
# Reinstalling takes seconds when nothing changed, and picks up what a new commit needs.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
PATH="$PWD/.venv/bin:$PATH"
# On a machine without an accelerator jax would look for one and warn; a set variable stays.
if ! ls /dev/accel* /dev/vfio/* /dev/nvidia0 >/dev/null 2>&1; then
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
fi
