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
    code = """
import builtins, os, sys
from fusedlm.cli import main
real = builtins.__import__
def watch(name, *rest):
    if name == 'torch':
        print('at import', os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules, flush=True)
        os._exit(0)
    return real(name, *rest)
builtins.__import__ = watch
main(['plan', 'recipes/demo.yaml', '--json'])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"at import {SPIN_COUNT} False\n"
