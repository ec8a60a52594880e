"""python -m fusedlm: the command line."""

import sys

from fusedlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
