"""What would be submitted to a cluster, what workers leave behind, and what is refused."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from fusedlm.config import load_recipe
from fusedlm.config.data import DataConfig
from fusedlm.data import prepare
from fusedlm.data.corpus import Corpus
from fusedlm.data.preparation import Submitted
from tests.data.pipeline.corpora import digests, settings, text, write

needs_datatrove = pytest.mark.skipif(importlib.util.find_spec("datatrove") is None, reason="datatrove is not installed")


@pytest.fixture
def source(tmp_path) -> Path:
    documents = [text(seed) for seed in range(40)]
    return write(tmp_path / "text", documents + documents[:5], 3)


SMALL = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("datatrove", "dill", "loguru", "orjson", "xxhash", "ray"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
from fusedlm.config.data import DataConfig, TextSource
from fusedlm.data.preparation import prepare
prepare(DataConfig(source=TextSource(path=sys.argv[1], separator="--"), dir=sys.argv[2]))
print([name for name in sys.modules if name.startswith("fusedlm.data.pipeline")])
"""


def test_one_file_is_prepared_without_datatrove(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n--\n".join(text(seed) for seed in range(60)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SMALL, str(path), str(tmp_path / "prepared")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.strip()) == (0, "[]"), ended.stderr


def test_a_missing_extra_is_one_line(source, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "datatrove" else found(name, *a))
    with pytest.raises(ValueError) as caught:
        prepare(settings(source, tmp_path / "prepared", {}))
    assert str(caught.value) == (
        "data.pipeline: datatrove is not installed; pip install 'fusedlm[prepare]', or set data.pipeline=null"
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"split": {"type": "tail"}, "pipeline": {}}, "split.type=tail: data.pipeline holds out full documents"),
        ({"source": {"type": "warc", "path": "a"}}, "source of type warc: only data.pipeline reads it"),
        ({"pipeline": {"executor": {"type": "slurm"}}}, "partition"),
        ({"pipeline": {"near": {"buckets": 0}}}, "greater than or equal to 1"),
        ({"pipeline": {"filters": [{"type": "gopher"}]}}, "gopher_quality"),
    ],
)
def test_contradictions_are_named(data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataConfig(**data)


@needs_datatrove
@pytest.mark.parametrize(
    ("documents", "pipeline", "message"),
    [
        (["", " \n"], {}, "data.source: no text in 1 file"),
        (["a"] * 30, {"filters": [{"type": "gopher_quality"}]}, "leaves nothing to train on of 30 documents; loosen"),
        ([text(1)] * 9, {"seed": 3}, "data.split.fraction=0.2: nothing is held out"),
    ],
)
def test_nothing_left_is_refused(tmp_path, documents, pipeline, message):
    with pytest.raises(ValueError, match=message) as caught:
        prepare(settings(write(tmp_path / "text", documents, 1), tmp_path / "prepared", pipeline))
    assert "\n" not in str(caught.value)


@needs_datatrove
def test_errors_of_workers_are_those_of_the_text(source, tmp_path):
    (source / "part-1.jsonl").write_text('{"text": "a"}\n{"text": }\n')
    pipeline = {"executor": {"type": "local", "workers": 2}, "tasks": 3}
    with pytest.raises(ValueError, match=r"part-1.jsonl:2: not JSON \(Expecting value"):
        prepare(settings(source, tmp_path / "prepared", pipeline))


class Dies:
    """An executor whose tasks are killed."""

    def _run_for_rank(self, rank, local_rank):
        os.kill(os.getpid(), signal.SIGKILL)


@needs_datatrove
def test_a_worker_that_was_killed_is_one_line(tmp_path):
    import dill

    from fusedlm.data.pipeline.executors import _Pool

    saved = tmp_path / "executor.pik"
    saved.write_bytes(dill.dumps(Dies()))
    message = "a worker was killed, perhaps for want of memory; run again to continue"
    with pytest.raises(ValueError, match=message), _Pool(2, tmp_path / "lock") as pool:
        list(pool.run(str(saved), [0, 1]))


class Waits:
    """An executor whose tasks do not end."""

    def __init__(self, folder: str):
        self._folder = folder

    def _run_for_rank(self, rank, local_rank):
        Path(self._folder, f"begun {rank}").touch()
        threading.Event().wait()


ABANDON = """
import sys
from pathlib import Path
import dill
from fusedlm.data.pipeline.executors import _Pool
from tests.data.pipeline.test_executors import Waits
folder = Path(sys.argv[1])
(folder / "executor.pik").write_bytes(dill.dumps(Waits(str(folder))))
if __name__ == "__main__":
    with _Pool(2, folder / "workers.lock") as pool:
        list(pool.run(str(folder / "executor.pik"), [0, 1]))
"""


@needs_datatrove
def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    from fusedlm.data.pipeline.executors import wait_for_workers

    script = tmp_path / "abandon.py"
    script.write_text(ABANDON)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment) as parent:
        while not all((tmp_path / f"begun {rank}").exists() for rank in (0, 1)):
            assert parent.poll() is None
            threading.Event().wait(0.1)
        parent.kill()  # its workers are in the middle of their tasks
    waiting = threading.Thread(target=wait_for_workers, args=(tmp_path, lambda *_: None), daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()


def programs(folder: Path, monkeypatch) -> Path:
    """sbatch that records what it gets and counts jobs, squeue that says what queue.txt says, scontrol."""
    folder.mkdir()
    record = folder / "submitted.jsonl"
    scripts = {
        "sbatch": f"""import json, sys
with open({str(record)!r}, "a+") as file:
    file.seek(0)
    number = 100 + len(file.readlines())
    file.write(json.dumps(dict(arguments=sys.argv[1:-1], script=open(sys.argv[-1]).read())) + "\\n")
print("Submitted batch job", number)
""",
        "squeue": f"print(open({str(folder / 'queue.txt')!r}).read(), end='')\n",
        "scontrol": "print('node')\n",
    }
    for name, content in scripts.items():
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{content}")
        path.chmod(0o755)
    (folder / "queue.txt").write_text("")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return record


@needs_datatrove
def test_what_is_submitted_to_slurm_prepares_the_same_text(source, tmp_path, monkeypatch):
    import dill

    expected = prepare(settings(source, tmp_path / "local", {}, tokenizer={"type": "bytes"}))
    record = programs(tmp_path / "bin", monkeypatch)
    slurm = {
        "type": "slurm",
        "partition": "cpu",
        "time": "1:00:00",
        "workers": 5,
        "memory_gb": 3,
        "single_memory_gb": 9,
        "qos": "low",
        "setup": "source /shared/venv/bin/activate",
        "sbatch": {"account": "mine"},
    }
    config = settings(source, tmp_path / "slurm", {"executor": slurm, "tasks": 99}, tokenizer={"type": "bytes"})
    with pytest.raises(Submitted, match="submitted to Slurm, the last stage as job 120; run the same command when"):
        prepare(config)
    jobs = [json.loads(line) for line in record.read_text().splitlines()]
    # After each array comes a job that adds up its statistics.
    arrays = {re.search("job-name=fusedlm-(.*)", job["script"])[1]: job for job in jobs[::2]}
    assert all("merge_stats" in job["script"] for job in jobs[1::2])
    n_tasks = {"read": 3, "exact": 3, "near": 14, "tokens": 3, "search": 3, "shards": 3}
    single = ["clusters", "tokenizer", "spans", "layout", "finish"]
    assert " ".join(arrays) == "read exact near clusters tokenizer tokens spans search layout shards finish"
    [work] = (tmp_path / "slurm").glob(".*.work")
    for number, (name, job) in enumerate(arrays.items()):
        lines = job["script"].splitlines()
        assert f"#SBATCH --array=0-{n_tasks.get(name, 1) - 1}%5" in lines
        assert f"#SBATCH --mem-per-cpu={9 if name in single else 3}G" in lines
        for option in ("partition=cpu", "time=1:00:00", "cpus-per-task=1", "account=mine", "qos=low"):
            assert f"#SBATCH --{option}" in lines
        assert "source /shared/venv/bin/activate" in lines
        assert any(line.endswith(f"launch_pickled_pipeline {work}/logs/{name}/executor.pik") for line in lines)
        after = [f"--dependency=afterok:{100 + 2 * (number - 1)}"] if number else []
        assert job["arguments"] == ["--export=ALL,RUN_OFFSET=0", *after]
    (tmp_path / "bin" / "queue.txt").write_text("120 cpu fusedlm-finish\n")
    with pytest.raises(Submitted, match="is with Slurm as job 120 and those before it"):
        prepare(config)
    assert len(record.read_text().splitlines()) == len(jobs)
    # What the nodes would do.
    monkeypatch.setenv("SLURM_NODELIST", "node")
    for name in arrays:
        for rank in range(n_tasks.get(name, 1)):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(rank))
            with open(work / "logs" / name / "executor.pik", "rb") as file:
                dill.load(file).run()
    assert digests(prepare(config).directory) == digests(expected.directory)
    assert not work.exists()


@needs_datatrove
def test_without_slurm_the_line_says_so(source, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    executor = {"type": "slurm", "partition": "cpu"}
    with pytest.raises(ValueError, match="^data.pipeline.executor.type=slurm: sbatch is not found; submit from a node"):
        prepare(settings(source, tmp_path / "prepared", {"executor": executor}))


class FakeRay(types.ModuleType):
    """As much of Ray as datatrove calls; actors run where they are called."""

    def __init__(self):
        super().__init__("ray")
        self.__spec__ = importlib.util.spec_from_loader("ray", None)
        self.address, self.options = None, []
        self.util = types.SimpleNamespace(
            placement_group=lambda bundles: types.SimpleNamespace(ready=lambda: bundles),
            remove_placement_group=lambda group: None,
            get_node_ip_address=lambda: "10.0.0.1",
        )
        self.exceptions = types.ModuleType("ray.exceptions")
        for name in ("ObjectLostError", "RayActorError", "TaskCancelledError", "WorkerCrashedError"):
            setattr(self.exceptions, name, type(name, (Exception,), {}))

    def is_initialized(self):
        return self.address is not None

    def init(self, address):
        self.address = address

    def put(self, value):
        return value

    def get(self, value):
        return value

    def wait(self, tasks, num_returns=1, timeout=None):
        return tasks[:1], tasks[1:]

    def remote(self, kind):
        return types.SimpleNamespace(options=lambda **options: self._actor(kind, options))

    def _actor(self, kind, options):
        self.options.append(options)

        def call(executor, ranks, node_ips, node):
            for rank in ranks:
                executor._run_for_rank(rank)
            return object()

        methods = types.SimpleNamespace(
            get_node_ip=types.SimpleNamespace(remote=lambda: "10.0.0.1"),
            run_for_rank=types.SimpleNamespace(remote=call),
        )
        return types.SimpleNamespace(remote=lambda: methods)


@needs_datatrove
def test_what_is_submitted_to_ray_prepares_the_same_text(source, tmp_path, monkeypatch):
    tokenizer = {"type": "bytes"}
    expected = prepare(settings(source, tmp_path / "local", {}, tokenizer=tokenizer))
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", ray.exceptions)
    monkeypatch.setattr("datatrove.executor.ray.check_required_dependencies", lambda *_: None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    executor = {"type": "ray", "address": "ray://head:10001", "workers": 1, "cpus": 2, "memory_gb": 3}
    prepared = prepare(settings(source, tmp_path / "ray", {"executor": executor, "tasks": 99}, tokenizer=tokenizer))
    assert digests(prepared.directory) == digests(expected.directory)
    assert ray.address == "ray://head:10001"
    n_tasks = 5 * 3 + 14  # read, exact, tokens, search, shards; near
    memory = [options["memory"] >> 30 for options in ray.options]
    assert sorted(memory) == [6] * n_tasks + [64] * 5
    assert all(options["num_cpus"] == 2 and options["num_gpus"] == 0 for options in ray.options)


@needs_datatrove
def test_without_ray_the_line_says_so(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="^data.pipeline.executor.type=ray: ray is not installed; pip install 'ray"):
        prepare(settings(source, tmp_path / "prepared", {"executor": {"type": "ray"}}))


@needs_datatrove
def test_the_command_line_says_what_was_submitted(source, tmp_path, monkeypatch, capsys):
    from fusedlm.cli import main

    programs(tmp_path / "bin", monkeypatch)
    overrides = [
        f"data.source={{type: jsonl, path: {source}}}",
        "data.pipeline={executor: {type: slurm, partition: cpu}}",
        f"data.dir={tmp_path / 'prepared'}",
    ]
    assert main(["data", "prepare", "demo", *overrides]) == 0
    assert "submitted to Slurm, the last stage as job 120" in capsys.readouterr().out


def test_what_runs_the_tasks_is_no_part_of_the_text(source, tmp_path):
    recipe = load_recipe("recipes/demo.yaml", ["data.pipeline={}"]).data
    other = load_recipe("recipes/demo.yaml", ["data.pipeline={tasks: 9, executor: {type: ray}}"]).data
    assert recipe.pipeline.text_settings() == other.pipeline.text_settings()
    assert Corpus(recipe, lambda *_: None).name == Corpus(other, lambda *_: None).name
