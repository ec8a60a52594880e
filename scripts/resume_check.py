"""Kill a run repeatedly, resume it, and compare its metrics with those of an uninterrupted run, bit for bit.

    python scripts/resume_check.py recipes/demo.yaml [key=value ...] [--steps 60] [--kills 5] [--seed 0]

The kills are SIGKILL at random steps, one of them while a checkpoint is being written.
The exit code is 0 if every recorded loss, gradient norm and validation is identical, 1 otherwise.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMINGS = {"tokens_per_second", "mfu", "peak_memory_bytes", "loader_wait_seconds", "step_seconds", "checkpoint_seconds"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_intermixed_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder, "straight"), Path(folder, "killed")
        command = [sys.executable, "-c", "from fusedlm.cli import main; main()", "train", arguments.recipe]
        command += [*arguments.overrides, f"train.steps={arguments.steps}", f"data.dir={folder}/prepared"]
        subprocess.run([*command, "--out", str(straight)], check=True, stdout=subprocess.DEVNULL)
        steps = sorted(draw.sample(range(1, arguments.steps), arguments.kills))
        in_checkpoint = arguments.kills // 2
        for kill, step in enumerate(steps):
            process = subprocess.Popen([*command, "--out", str(killed), "--resume"], stdout=subprocess.DEVNULL)
            if kill == in_checkpoint:
                _wait_until(lambda: any(killed.glob("checkpoints/.fusedlm-step-*.tmp")), process)
            else:
                _wait_until(lambda step=step: _last_step(killed) >= step, process)
                time.sleep(draw.uniform(0, 0.2))
            process.kill()
            process.wait()
            half_written = ", ".join(path.name for path in killed.glob("checkpoints/.fusedlm-step-*.tmp"))
            print(f"kill {kill + 1}: last recorded step {_last_step(killed)}, half-written: {half_written or 'none'}")
        subprocess.run([*command, "--out", str(killed), "--resume"], check=True, stdout=subprocess.DEVNULL)
        return _compare(_records(straight), _records(killed))


def _wait_until(condition, process) -> None:
    while not condition():
        if process.poll() is not None:
            raise SystemExit("the run ended before it could be killed; raise --steps or lower --kills")


def _last_step(run: Path) -> int:
    return (_records(run) or [{"step": 0}])[-1]["step"]


def _records(run: Path) -> list[dict]:
    """The metrics without timings; a line that a kill interrupted is skipped."""
    path, records = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records.append({key: value for key, value in record.items() if key not in TIMINGS})
    return records


def _compare(straight: list[dict], killed: list[dict]) -> int:
    if straight == killed:
        print(f"identical: {len(straight)} records, final loss {straight[-2]['loss']!r}")
        return 0
    first = next((a for a, b in zip(straight, killed, strict=False) if a != b), None)
    print(f"DIFFERENT: {len(straight)} and {len(killed)} records, first difference: {first}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
