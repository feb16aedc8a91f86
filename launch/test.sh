#!/usr/bin/env bash
# Runs the linter and the tests. Needs only python3 >= 3.11 with pip.
#
#   bash launch/test.sh                    everything
#   bash launch/test.sh -m "not slow"      the fast tests; all arguments are passed to pytest
#
# PYTHON is the interpreter for a new .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh test

ruff check .
ruff format --check .
python -m pytest "$@"
