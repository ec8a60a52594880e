"""What of a run folder is not as it was written, in sentences for a report."""

from pathlib import Path

from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.choose import Found, newest_intact
from fusedlm.runs.folder import CHECKPOINTS, METRICS, RECIPE
from fusedlm.runs.identity import IDENTITY, changed_files, read_identity
from fusedlm.runs.metrics import audit_metrics
from fusedlm.runs.state import STATE


def check_run(run_dir: Path) -> list[str]:
    """A sentence for each file that was changed and each range of steps that is missing. Weights are not read: loading
    them checks them. Runs of earlier versions have fewer checksums, and pass where they have none.

    Raises:
        OSError: the system cannot read a file.
    """
    problems, identity = [], None
    try:
        identity = read_identity(run_dir)
    except ValueError:
        problems.append(f"{IDENTITY} was changed after it was written.")
    if identity is not None:
        problems += [
            f"{name} was changed after it was written." if (run_dir / name).exists() else f"{name} is missing."
            for name in changed_files(run_dir, identity)
        ]
    # Before the metrics, which a run that is training syncs before each checkpoint.
    try:
        found = newest_intact(Checkpoints(run_dir / CHECKPOINTS), identity and identity.run, only=(STATE, RECIPE))
    except ValueError as error:  # of another version
        problems.append(f"{error}.")
        found = Found(None, [])
    problems += [f"{damage.kind.capitalize()} checkpoint: {damage}." for _, damage in found.refused]
    state = found.state
    if state is not None and state.run is not None and not (run_dir / IDENTITY).exists():
        problems.append(f"{IDENTITY} is missing.")
    audit = audit_metrics(run_dir / METRICS)
    metrics = [f"line {number} is not a record" for number in audit.damaged] + audit.problems
    if state is not None:
        before = audit_metrics(run_dir / METRICS, state.step, state.metrics)
        metrics += [problem for problem in before.problems if problem not in metrics]
    if metrics:
        problems.append(f"{METRICS} is not as it was written: {'; '.join(metrics)}.")
    return problems
