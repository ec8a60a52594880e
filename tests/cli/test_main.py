"""Common to all commands: help, version, exit codes, closed pipes and full disks."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading

import pytest

import fusedlm as package
from fusedlm.cli import main
from fusedlm.cli.common import show

COMMANDS = ["train", "eval", "generate", "compare", "data", "report", "plan", "doctor"]
PROGRAM = [sys.executable, "-c", "import sys; from fusedlm.cli import main; sys.exit(main())"]


def test_help_names_every_command_and_does_not_load_torch():
    code = "import sys; from fusedlm.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f" {command} " in done.stdout


@pytest.mark.parametrize("arguments", [[], ["-h"], ["data"], *([command, "--help"] for command in COMMANDS)])
def test_every_command_has_help(arguments, fusedlm):
    outcome = fusedlm(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert "Usage: fusedlm" in outcome.out


def test_version(fusedlm):
    assert fusedlm("--version").out == f"fusedlm {package.__version__}\n"


def _raising(error, monkeypatch):
    def write_report(run):
        raise error

    monkeypatch.setattr("fusedlm.report.write_report", write_report)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("dim=3 is odd;\n  use 4"), "error: dim=3 is odd; use 4"),
        (ValueError(), "error: ValueError"),
        (
            OSError(28, "No space left on device", "runs/x/report.html"),
            "error: runs/x/report.html: No space left on device",
        ),
        (OSError(28, "No space left on device"), "error: No space left on device"),
        (OSError("12 requested and 8 written"), "error: 12 requested and 8 written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(error, line, fusedlm, monkeypatch):
    _raising(error, monkeypatch)
    outcome = fusedlm("report", "runs/x")
    assert (outcome.code, outcome.out, outcome.err) == (2, "", line + "\n")


def test_interrupt_is_quiet(fusedlm, monkeypatch):
    _raising(KeyboardInterrupt(), monkeypatch)
    outcome = fusedlm("report", "runs/x")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "")


def test_defects_keep_their_traceback(monkeypatch):
    _raising(RuntimeError("a defect"), monkeypatch)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["report", "runs/x"])


def test_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*PROGRAM, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_full_disk_behind_stdout():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, "--version"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


@pytest.mark.parametrize(("terminal", "shown"), [(True, r"a\x1b[31m\u202e"), (False, "a\x1b[31m\u202e")])
def test_generated_text_cannot_drive_a_terminal(terminal: bool, shown: str, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    show("a\x1b[31m\u202e\tb\né")
    assert capsys.readouterr().out == shown + "\tb\né"


def test_errors_are_one_line_without_control_characters(fusedlm, tmp_path):
    outcome = fusedlm("train", tmp_path / "a\x1b[2J\nb\u202ec\x9b.yaml")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert r"a\x1b[2J\nb\u202ec\x9b.yaml: No such file" in outcome.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_with_128_and_its_number(number, fusedlm, monkeypatch):
    cleaned = []

    def write_report(run):
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(run)

    monkeypatch.setattr("fusedlm.report.write_report", write_report)
    before = signal.getsignal(number)
    outcome = fusedlm("report", "runs/x")
    assert (outcome.code, outcome.out, outcome.err) == (128 + number, "", "")
    assert cleaned and signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored(fusedlm, monkeypatch):
    """As nohup wants it."""

    def write_report(run):
        signal.raise_signal(signal.SIGHUP)
        return run

    monkeypatch.setattr("fusedlm.report.write_report", write_report)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert fusedlm("report", "runs/x").code == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_command_runs_in_another_thread():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
SIGNALLED = """
import signal, sys
from fusedlm import cli
def train():
    print("begun", end="")
    try:
        signal.raise_signal(%d)
    finally:
        signal.raise_signal(%d)
        print(", cleaned", end="")
cli.app.registered_commands[0].callback = train
sys.exit(cli.main(%s))
"""


@pytest.mark.parametrize(
    ("first", "second", "code", "printed"),
    [
        (signal.SIGTERM, signal.SIGTERM, -signal.SIGTERM, ""),
        (signal.SIGHUP, signal.SIGTERM, -signal.SIGTERM, ""),
        (signal.SIGTERM, signal.SIGHUP, 128 + signal.SIGTERM, "begun, cleaned"),
        (signal.SIGHUP, signal.SIGHUP, 128 + signal.SIGHUP, "begun, cleaned"),
    ],
)
def test_a_second_sigterm_kills_and_a_second_sighup_is_ignored(first, second, code, printed):
    """A closed terminal sends SIGHUP several times, also while the command cleans up."""
    program = [sys.executable, "-c", SIGNALLED % (first, second, ""), "train"]
    done = subprocess.run(program, capture_output=True, text=True, env=BUFFERED)
    assert (done.returncode, done.stdout, done.stderr) == (code, printed, "")


IN_BACKGROUND = """
import subprocess, sys
done = subprocess.run([sys.executable, "-c", %r, "train"], process_group=0)
sys.exit(done.returncode if done.returncode >= 0 else 7)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a pseudo-terminal with job control")
def test_an_interrupt_in_a_terminal_stops_the_loop_of_a_shell():
    """The shell must see that the command died of it; elsewhere the exit code says so."""

    def in_terminal(code: str) -> tuple[int, str]:
        """Exit code and output."""
        pid, terminal = pty.fork()
        if pid == 0:
            os.execve(sys.executable, [sys.executable, "-c", code, "train"], BUFFERED)
        shown = b""
        with contextlib.suppress(OSError):
            while found := os.read(terminal, 1024):
                shown += found
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()

    interrupt = SIGNALLED % (signal.SIGINT, 0, "")
    assert in_terminal(interrupt) == (-signal.SIGINT, "begun, cleaned")
    assert in_terminal(SIGNALLED % (signal.SIGINT, 0, "sys.argv[1:]")) == (130, "begun, cleaned")
    assert in_terminal(IN_BACKGROUND % interrupt) == (130, "begun, cleaned")
    command = [sys.executable, "-c", interrupt, "train"]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE).returncode == 130
