# shellcheck shell=bash
# Sourced from the repository root by demo.sh and test.sh: `source launch/venv.sh EXTRA` creates .venv
# if it does not exist, installs this checkout with that extra, and puts it first on the PATH.
python_is_new() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# An interrupted setup leaves a .venv without pip, which is recreated.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  PYTHON=${PYTHON:-python3}
  if ! python_is_new "$PYTHON"; then
    echo "error: '$PYTHON' is not Python 3.11 or newer; set PYTHON=/path/to/python3" >&2
    exit 1
  fi
  "$PYTHON" -m venv .venv
fi
# Reinstalling takes seconds if nothing changed, and installs the new requirements of a commit.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
PATH="$PWD/.venv/bin:$PATH"
# Without an accelerator jax would search for one and warn. Keeps JAX_PLATFORMS if it is set.
if ! ls /dev/accel* /dev/vfio/* /dev/nvidia0 >/dev/null 2>&1; then
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
fi
