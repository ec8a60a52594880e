"""What reaches a terminal: text that cannot drive it, and output that cannot end a run."""

from fusedlm.terminal.streams import make_console, outlast_output, standard_streams
from fusedlm.terminal.text import one_line, printable

__all__ = ["make_console", "one_line", "outlast_output", "printable", "standard_streams"]
