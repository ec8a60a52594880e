"""fusedlm eval --probe and --yarn: output, files, and refused arguments."""

import json
from pathlib import Path

import pytest
import yaml

from fusedlm.probes.usable import describe_usable

RUN = "runs/small"
LONG = " ".join(f"Sentence {i} speaks of {i * i % 97} ships and of nothing else." for i in range(60))


@pytest.fixture
def long_text(workspace: Path) -> str:
    Path("long.txt").write_text(LONG, encoding="utf-8")
    return "long.txt"


@pytest.fixture
def without_rope(workspace: Path) -> str:
    """A recipe like that of the run, with gated delta nets only."""
    recipe = yaml.safe_load(Path("small.yaml").read_text())
    recipe["model"]["pattern"] = "g"
    Path("plain.yaml").write_text(yaml.safe_dump(recipe))
    return "plain.yaml"


def written(probe: str, folder: str = f"{RUN}/probes") -> dict:
    assert Path(folder, f"{probe}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads(Path(folder, f"{probe}.json").read_text())


def test_mqar_of_a_run_and_of_its_recipe(workspace: Path, fusedlm):
    options = ("--probe", "mqar", "--steps", 2, "--pairs", "2,3", "--samples", 4)
    outcome = fusedlm("eval", RUN, *options)
    assert outcome.code == 0, outcome.err
    record = written("mqar")
    assert [point["pairs"] for point in record["accuracy"]] == [2, 3]
    assert record["training"]["steps"] == 2 and record["environment"]["torch"]
    for point in record["accuracy"]:
        assert f"{point['accuracy']:.1%}" in outcome.out
    assert f"{RUN}/probes/mqar.json" in outcome.out
    outcome = fusedlm("eval", "small.yaml", *options, "--out", "elsewhere", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out) == written("mqar", "elsewhere")
    assert written("mqar", "elsewhere")["accuracy"] == record["accuracy"]


def test_needle_before_and_after_finetuning(workspace: Path, long_text: str, fusedlm):
    options = ("--probe", "needle", "--text", long_text, "--samples", 2, "--depths", "0,1")
    outcome = fusedlm("eval", RUN, *options, "--lengths", "8,16,1000")
    assert outcome.code == 0, outcome.err
    record = written("needle")
    assert [(c["length"], c["depth"]) for c in record["cells"]] == [(128, 0), (128, 1), (256, 0), (256, 1)]
    assert record["left_out"] == [16000] and "16,000 tokens" in outcome.out
    assert record["finetuning"] is None and record["checkpoint"] == 2
    assert fusedlm("eval", RUN, *options, "--lengths", "8,16", "--yarn", 8).code == 0
    assert written("needle")["yarn"] == 8 and written("needle")["cells"] != record["cells"]
    longer = fusedlm("train", "small.yaml", "train.seq_len=96", "train.steps=1", "--out", "runs/longer")
    assert longer.code == 0, longer.err
    before = json.loads(fusedlm("eval", "runs/longer", *options, "--lengths", "1,2", "--json").out)
    outcome = fusedlm("eval", "runs/longer", *options, "--lengths", "1,2", "--steps", 2, "--lr", "0.01", "--json")
    assert outcome.code == 0, outcome.err
    after = json.loads(outcome.out)
    assert (after["finetuning"]["steps"], after["finetuning"]["lr"]) == (2, 0.01)
    assert after["cells"] != before["cells"]


def test_extend_with_and_without_rope(workspace: Path, long_text: str, without_rope: str, fusedlm):
    outcome = fusedlm("eval", RUN, "--probe", "extend", "--text", long_text, "--factors", "2,4", "--samples", 5)
    assert outcome.code == 0, outcome.err
    record = written("extend")
    assert [curve["yarn"] for curve in record["curves"]] == [None, 2, 4]
    assert record["max_multiple"] == 8 and record["windows"] == 5
    first = outcome.out.splitlines()[0]
    assert first == describe_usable(record) and f"{record['usable']['as_it_is']:,} tokens (" in first
    assert "YaRN 4" in outcome.out and f"{record['curves'][2]['bpb'][-1]:.4f}" in outcome.out
    rows = [line.split() for line in outcome.out[outcome.out.index("on the same text") :].splitlines()]
    plain, _, stretched = record["curves"]
    assert ["unstretched", f"{plain['at_1x']:.4f}", f"{plain['at_4x']:.4f}"] in rows
    changes = [f"{stretched[f'change_{n}x']:+.4f}" for n in (1, 4)]
    errors = [f"{stretched[f'change_{n}x_error']:.4f}" for n in (1, 4)]
    expected = ["YaRN", "4", f"{stretched['at_1x']:.4f}", f"{stretched['at_4x']:.4f}"]
    assert [*expected, changes[0], "±", errors[0], changes[1], "±", errors[1]] in rows
    assert fusedlm("train", without_rope, "train.steps=1", "--out", "runs/plain").code == 0
    outcome = fusedlm("eval", "runs/plain", "--probe", "extend", "--text", long_text)
    assert "no mixer of this model has rotary embedding, which YaRN stretches" in outcome.out
    assert len(written("extend", "runs/plain/probes")["curves"]) == 1
    assert "no mixer" in fusedlm("eval", "runs/plain", "--yarn", 2).err


def test_extend_says_that_documents_are_too_short_for_longer_windows(workspace: Path, fusedlm):
    outcome = fusedlm("eval", RUN, "--probe", "extend")
    assert outcome.code == 0, outcome.err
    assert written("extend")["max_multiple"] == 2 and "no document has 64 tokens" in outcome.out
    assert "on the same text" not in outcome.out


def test_yarn_changes_the_score_and_generates(workspace: Path, long_text: str, fusedlm):
    def bpb(*options):
        outcome = fusedlm("eval", RUN, "--text", long_text, "--window", 64, "--json", *options)
        assert outcome.code == 0, outcome.err
        result = json.loads(outcome.out)
        return result["bpb"], result["yarn"]

    plain, one, four = bpb(), bpb("--yarn", 1), bpb("--yarn", 4)
    assert (plain[1], one[1], four[1]) == (None, 1, 4)
    assert one[0] == pytest.approx(plain[0], rel=1e-6) and abs(four[0] - plain[0]) > 1e-7
    assert fusedlm("generate", RUN, "--prompt", "Document", "--max-tokens", 4, "--yarn", 2).code == 0


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("eval {run} --probe recall", "'recall': must be one of mqar, needle, extend"),
        ("eval {run} --steps 5", "--steps is not an option of scoring without --probe"),
        ("eval {run} --out here", "--out"),
        ("eval {run} --probe mqar --text long.txt", "--text is not an option of --probe mqar"),
        ("eval {run} --probe mqar --yarn 2", "--yarn"),
        ("eval {run} --probe mqar --checkpoint 1", "--checkpoint"),
        ("eval {run} --probe mqar --weights ema", "--weights"),
        ("eval {run} --probe mqar --window 8", "--window"),
        (
            "eval {run} --probe needle --pairs 4",
            "--pairs is not an option of --probe needle; it is one of --probe mqar",
        ),
        ("eval {run} --probe needle --factors 4", "--factors"),
        ("eval {run} --probe extend --yarn 2", "--yarn"),
        ("eval {run} --probe extend --steps 3", "--steps"),
        ("eval {run} --probe extend --seed 3", "--seed"),
        ("eval {run} --probe mqar --steps 0", "steps=0"),
        ("eval {run} --probe mqar --steps many", "'many'"),
        ("eval {run} --probe mqar --samples 0", "samples=0"),
        ("eval {run} --probe mqar --seed -1", "seed=-1"),
        ("eval {run} --probe mqar --lr nan", "lr=nan"),
        ("eval {run} --probe mqar --pairs 4,x", "'4,x'"),
        ("eval {run} --probe mqar --pairs 2.5", "2.5"),
        ("eval {run} --probe mqar --pairs 0,4", "pairs=[0, 4]"),
        ("eval {run} --probe mqar --pairs 65", "pairs=65"),
        ("eval small.yaml --probe mqar --steps 1", "--out"),
        ("eval small.yaml --probe extend --out here", "small.yaml"),
        ("eval runs/none --probe mqar", "runs/none"),
        ("eval runs/none --probe needle", "runs/none"),
        ("eval {run} --probe needle --lengths 8", "longest document"),
        ("eval {run} --probe needle --text long.txt --lengths 1", "does not hold a needle"),
        ("eval {run} --probe needle --text long.txt --lengths 0", "lengths="),
        ("eval {run} --probe needle --text long.txt --lengths 8,", "'8,'"),
        ("eval {run} --probe needle --text long.txt --lengths 1e308", "lengths=1e+308"),
        ("eval {run} --probe needle --text long.txt --lengths 1e-9", "lengths=1e-09"),
        ("eval {run} --probe needle --text long.txt --samples 100000000000", "samples=100000000000"),
        ("eval {run} --probe mqar --seed 18446744073709551616", "seed=18446744073709551616"),
        ("eval {run} --probe extend --text long.txt --data prepared", "give only one of them"),
        ("eval {run} --probe needle --text long.txt --depths 2", "depths="),
        ("eval {run} --probe needle --text long.txt --samples 0", "samples=0"),
        ("eval {run} --probe needle --text long.txt --steps -1", "--steps -1"),
        ("eval {run} --probe needle --text long.txt --lr 0.1", "--steps"),
        ("eval {run} --probe needle --text long.txt --steps 1 --lr 0", "--lr 0"),
        ("eval {run} --probe needle --text long.txt --steps 1", "training length of 16 tokens"),
        ("eval {run} --probe needle --text none.txt", "none.txt"),
        ("eval {run} --probe extend --text none.txt", "none.txt"),
        ("eval {run} --probe extend --factors 0.5", "factor 0.5"),
        ("eval {run} --probe extend --factors inf", "factor inf"),
        ("eval {run} --probe extend --samples 0", "samples=0"),
        ("eval {run} --probe extend --text short.txt", "fewer than the training length 16"),
        ("eval {run} --probe extend --checkpoint 99", "99"),
        ("eval {run} --probe extend --out /proc/new", "/proc/new"),
        ("eval {run} --probe extend --out long.txt", "long.txt"),
        ("eval {run} --yarn 0.5", "--yarn 0.5"),
        ("eval {run} --yarn nan", "--yarn nan"),
        ("eval {run} --yarn far", "'far'"),
        ("generate {run} --prompt a --yarn 0", "--yarn 0"),
    ],
)
def test_bad_input(line: str, named: str, workspace: Path, long_text: str, fusedlm):
    Path("short.txt").write_text("short")
    outcome = fusedlm(*line.format(run=RUN).split(" "))
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert named in outcome.err
    assert not list(Path(RUN).glob("probes/*"))


def test_the_coordinate_check_writes_its_files_and_prints_the_growth(fusedlm, workspace):
    options = ("--widths", "16,32", "--steps", 2, "--batch-size", 2, "--seq-len", 8, "--device", "cpu")
    outcome = fusedlm("probe", "coordinates", "small.yaml", *options)
    assert outcome.code == 0, outcome
    record = json.loads((workspace / "probes/coordinates.json").read_text())
    assert record["widths"] == [16, 32] and record["base_width"] == 16 and record["probe"] == "coordinates"
    assert (workspace / "probes/coordinates.png").read_bytes().startswith(b"\x89PNG")
    assert "Growth of mean |x| from width 16 to 32, after 2 steps:" in outcome.out
    growth = record["growth"]["mup"]["logits"]
    assert f"{growth:.2f}×" in next(line for line in outcome.out.splitlines() if "logits" in line)
    assert fusedlm("probe").code == 0
