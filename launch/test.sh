#!/usr/bin/env bash
# Runs the linters, the type checker and the tests. Needs only python3 >= 3.11 with pip.
#
#   bash launch/test.sh                    everything
#   bash launch/test.sh -m "not slow"      the fast tests; all arguments are passed to pytest
#
# PYTHON is the interpreter for a new .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR source=venv.sh
source launch/venv.sh test

ruff check .
ruff format --check .
mypy
python -m pytest "$@"
