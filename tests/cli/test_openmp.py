import subprocess
import sys

import pytest

from fusedlm.cli.openmp import SPIN_COUNT, bound_spinning


@pytest.mark.parametrize("own", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_the_users_choice_is_kept(own):
    environment = dict(own)
    bound_spinning(environment)
    assert environment == own


def test_a_command_sets_the_bound_before_torch_is_imported():
    code = (
        "import os, sys; from fusedlm.cli import main; main(['plan', 'recipes/demo.yaml', '--json']); "
        "print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules, file=sys.stderr)"
    )
    check = (
        "import sys; import fusedlm.cli; import builtins, os; real = builtins.__import__\n"
        "def watch(name, *rest):\n"
        "    if name == 'torch' and 'torch' not in sys.modules: print('at import', os.environ.get('GOMP_SPINCOUNT'))\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = watch\n"
    )
    done = subprocess.run([sys.executable, "-c", check + code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"at import {SPIN_COUNT}\n")
    assert done.stderr.split() == [SPIN_COUNT, "True"]
