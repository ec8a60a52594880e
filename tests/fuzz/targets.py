"""What is fuzzed: folders of files that fusedlm reads back, and how each is read.

A target makes an intact folder once. A case copies it, damages a file and reads the copy: the reading must raise
ValueError or OSError with one line, say in a note or warning what it found, or give what the intact folder gives.
`plain` files are the user's own: other content is another input there, and only tracebacks, hangs and memory count.
"""

import gzip
import hashlib
import io
import json
import logging
import lzma
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from fusedlm.compare import run_experiment
from fusedlm.config import dump_recipe, load_recipe, parse_recipe
from fusedlm.config.data import JSONLSource, ParquetSource, TextSource
from fusedlm.config.experiment import load_experiment
from fusedlm.data import prepare
from fusedlm.data.manifest import write_manifest
from fusedlm.data.shards import open_prepared
from fusedlm.data.sources import open_source
from fusedlm.data.tokenizer import read_tokenizer_file, train_bpe
from fusedlm.evaluate import text_documents
from fusedlm.files import sha256_file
from fusedlm.quant.artifact import read_artifact
from fusedlm.report.write import write_report
from fusedlm.runs import load
from fusedlm.runs.checkpoint import MANIFEST
from fusedlm.train import train
from tests.fuzz.mutations import damage_file, damage_yaml
from tests.quant.artifacts import matrix, normal_codes, pack_small
from tests.train.runs import tiny_recipe

_TEXT = "A river, an old bridge, tea at 5.\nStone — “and” water.\r\n\n日本語 \U0001f375\n"


@dataclass(frozen=True)
class Reading:
    """What a reader gave: a digest of all that it returned, and what it said."""

    digest: str
    said: str = ""


def digest(*values) -> str:
    return hashlib.sha256("\0".join(map(str, values)).encode("utf-8", errors="surrogatepass")).hexdigest()


class Notes(logging.Handler):
    """Collects warnings."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> "Notes":
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *exception) -> None:
        logging.getLogger().removeHandler(self)


class Target(ABC):
    """A folder and its reader."""

    name: str
    patterns: tuple[str, ...]  # of the files to damage
    home: Path  # the intact folder; paths in recipes lead there
    markers: tuple[str, ...] = ()  # files in which `damage` leaves the name of the damaged file, for `read`

    @abstractmethod
    def make(self, folder: Path) -> None:
        """Write the intact folder."""

    @abstractmethod
    def read(self, folder: Path, draw: random.Random) -> Reading:
        """Read a folder, damaged or intact."""

    def is_plain(self, path: Path, how: str) -> bool:
        """Whether other content is another input of the user, not damage."""
        return "sealed" in how  # who makes all checksums right is not told from a writer

    def damage(self, folder: Path, draw: random.Random) -> tuple[Path, str]:
        """Damage one file; the file and how."""
        files = sorted({path for pattern in self.patterns for path in folder.glob(pattern) if path.is_file()})
        path = draw.choice(files)
        return path, damage_file(path, draw)


class Recipes(Target):
    """A recipe of the user, with overrides; what is accepted must survive dumping and reading."""

    name, patterns = "recipe", ("recipe.yaml",)
    overrides = (
        "train.steps=",
        "model.dim=",
        "model.n_layers=",
        "model.blocks.g.mixer=",
        "model.blocks.g.mixer.n_heads=",
        "data.source.separator=",
        "data.tokenizer.vocab_size=",
        "train.optimizer.lr=",
        "train.seed=",
        "name=",
        "description=",
        "runtime.backends.attention=",
    )

    def make(self, folder: Path) -> None:
        recipe = tiny_recipe(folder)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")

    def is_plain(self, path: Path, how: str) -> bool:
        return True

    def read(self, folder: Path, draw: random.Random) -> Reading:
        from fusedlm.cli.plan import make_plan

        given = []
        if draw.random() < 0.3:
            value = damage_yaml(b"1", draw).decode("utf-8", errors="replace")
            given = [draw.choice(self.overrides) + value]
        recipe = load_recipe(folder / "recipe.yaml", given)
        if parse_recipe(dump_recipe(recipe)) != recipe:
            raise AssertionError("dump and parse differ")
        make_plan(recipe, vocab_size=257)
        return Reading("")


class Experiments(Target):
    """An experiment of the user and its base recipe."""

    name, patterns = "experiment", ("*.yaml",)

    def make(self, folder: Path) -> None:
        (folder / "base.yaml").write_text(dump_recipe(tiny_recipe(folder)), encoding="utf-8")
        (folder / "experiment.yaml").write_text(
            "name: tiny\nbase: base.yaml\nmatch: params\nvariants:\n  latent: [model.pattern=m]\n"
            "  softmax: {model.pattern: a, model.dim: 32}\nseeds: 2\ndecode_lengths: [20, 70]\n",
            encoding="utf-8",
        )

    def is_plain(self, path: Path, how: str) -> bool:
        return True

    def read(self, folder: Path, draw: random.Random) -> Reading:
        load_experiment(folder / "experiment.yaml")
        return Reading("")


class Sources(Target):
    """Text of the user. Formats with checksums must not give other text."""

    name, patterns, markers = "source", ("text/*",), ("damaged",)

    def make(self, folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet
        import zstandard

        text = folder / "text"
        text.mkdir(parents=True)
        raw = (_TEXT * 20).encode()
        rows = [{"text": f"{i} {_TEXT}", "meta": {"text": f"meta {i}"}} for i in range(20)]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (text / "a.txt").write_bytes(raw)
        (text / "a.txt.gz").write_bytes(gzip.compress(raw, mtime=0))
        (text / "a.txt.xz").write_bytes(lzma.compress(raw))
        (text / "a.txt.zst").write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(raw))
        (text / "a.jsonl").write_bytes(lines)
        (text / "a.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, text / "a.parquet", write_page_checksum=True, compression="snappy")

    def is_plain(self, path: Path, how: str) -> bool:
        return path.suffix in (".txt", ".jsonl") or how == "sibling"

    def damage(self, folder: Path, draw: random.Random) -> tuple[Path, str]:
        path, how = super().damage(folder, draw)
        (folder / "damaged").write_text(path.name)
        return path, how

    def read(self, folder: Path, draw: random.Random) -> Reading:
        marker = folder / "damaged"
        names = [marker.read_text()] if marker.exists() else sorted(p.name for p in (folder / "text").iterdir())
        found = {}
        for name in names:
            path = str(folder / "text" / name)
            config = (
                ParquetSource(path=path)
                if ".parquet" in name
                else JSONLSource(path=path)
                if ".jsonl" in name
                else TextSource(path=path)
            )
            found[name] = digest(*(document.text for document in open_source(config).documents()))
        return Reading(json.dumps(found))


class TokenizerFiles(Target):
    """A tokenizer.json of the user: it must encode text losslessly, or say that it does not."""

    name, patterns = "tokenizer", ("tokenizer.json",)

    def make(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        train_bpe([_TEXT * 4], 300).save(folder)

    def is_plain(self, path: Path, how: str) -> bool:
        return True

    def read(self, folder: Path, draw: random.Random) -> Reading:
        tokenizer = read_tokenizer_file(folder / "tokenizer.json")
        [(tokens, n_bytes)] = text_documents(_TEXT, tokenizer)
        if n_bytes != len(_TEXT.encode()) or tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size:
            raise AssertionError("ids outside of the vocabulary")
        return Reading("")


class Prepared(Target):
    """A prepared folder; half of the cases have their checksums made right after the damage."""

    name, patterns = "prepared", ("prepared/*/*",)

    def make(self, folder: Path) -> None:
        prepare(tiny_recipe(folder, "data.shard_tokens=600", "data.tokenizer={type: bpe, vocab_size: 270}").data)

    def damage(self, folder: Path, draw: random.Random) -> tuple[Path, str]:
        path, how = super().damage(folder, draw)
        if draw.random() < 0.5 and path.is_file():
            how += ", sealed"
            _seal_prepared(path.parent)
        return path, how

    def read(self, folder: Path, draw: random.Random) -> Reading:
        [directory] = [path for path in (folder / "prepared").iterdir() if path.is_dir()]
        data = open_prepared(directory)
        found = []
        for split in (data.train, data.validation):
            for tokens, n_bytes in split.documents():
                if len(tokens) and (tokens.min() < 0 or tokens.max() >= data.tokenizer.vocab_size):
                    raise AssertionError("token outside of the vocabulary")
                found.append((tokens.tolist(), n_bytes))
        return Reading(digest(found, data.tokenizer.encode(_TEXT)))


def _seal_prepared(directory: Path) -> None:
    """Make the checksums of a prepared folder right, as somebody would who forges it."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        files = {name: sha256_file(directory / name) for name in manifest.pop("files") if (directory / name).is_file()}
        manifest.pop("checksum", None)
        write_manifest(directory, manifest, files)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        pass  # beyond what can be forged; the damage stays as it is


class Runs(Target):
    """A finished run: loaded, reported and resumed."""

    name, patterns = "run", ("run/*.yaml", "run/*.json", "run/*.jsonl", "run/checkpoints/*/*")

    def make(self, folder: Path) -> None:
        train(self._recipe(folder), folder / "run")

    @staticmethod
    def _recipe(folder: Path):
        short = ("train.steps=6", "train.eval_every=3", "train.checkpoint_every=3", "model.pattern=m")
        return tiny_recipe(folder, *short)

    def damage(self, folder: Path, draw: random.Random) -> tuple[Path, str]:
        path, how = super().damage(folder, draw)
        manifest = path.parent / MANIFEST
        if path.parent.parent.name == "checkpoints" and draw.random() < 0.3 and path.is_file():
            how += ", sealed"
            _seal_checkpoint(manifest)
        return path, how

    def read(self, folder: Path, draw: random.Random) -> Reading:
        run = folder / "run"
        how = draw.choice(("load", "load", "report", "resume"))
        with Notes() as notes:
            if how == "load":
                model, tokenizer, recipe = load(run, device="cpu")
                tokens = torch.tensor([tokenizer.encode("tea and water")])
                with torch.no_grad():
                    logits = model(tokens).logits
                found = digest(logits.tolist(), tokenizer.decode(range(256)), dump_recipe(recipe))
                return Reading(f"load {found}", "\n".join(notes.lines))
            if how == "report":
                page = write_report(run).read_text(encoding="utf-8")
                return Reading("report", page)
            recipe = self._recipe(self.home)
            output = io.StringIO()
            result = train(recipe, run, resume=True, console=Console(file=output, width=300))
            metrics = (run / "metrics.jsonl").read_text(encoding="utf-8")
            found = digest(result.step, result.val_bpb, [line for line in metrics.split("\n") if '"val_bpb"' in line])
            return Reading(f"resume {found}", output.getvalue() + "\n".join(notes.lines))


def _seal_checkpoint(manifest: Path) -> None:
    from fusedlm.runs import checkpoint

    try:
        names = [path for path in sorted(manifest.parent.iterdir()) if path.is_file() and path.name != MANIFEST]
        files = {path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size} for path in names}
        manifest.write_text(checkpoint._manifest_text(files), encoding="utf-8")
    except OSError:
        pass


class Comparisons(Target):
    """A finished experiment, reported again."""

    name = "compare"
    patterns = (
        "out/identity.json",
        "out/calibration.json",
        "out/records/*",
        "out/decoding/*",
        "out/runs/*/metrics.jsonl",
        "out/runs/*/environment.json",
    )

    def make(self, folder: Path) -> None:
        recipe = tiny_recipe(folder, "train.steps=4", "train.eval_every=2", "train.checkpoint_every=2")
        (folder / "base.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        (folder / "experiment.yaml").write_text(
            "name: tiny\nbase: base.yaml\nmatch: params\nvariants:\n  latent: [model.pattern=m]\n"
            "  softmax: {model.pattern: a}\nseeds: 1\ndecode_lengths: [20]\n",
            encoding="utf-8",
        )
        run_experiment(*load_experiment(folder / "experiment.yaml"), folder / "out")

    def read(self, folder: Path, draw: random.Random) -> Reading:
        output = io.StringIO()
        config, recipes = load_experiment(folder / "experiment.yaml")
        with Notes() as notes:
            outcome = run_experiment(
                config, recipes, folder / "out", console=Console(file=output, width=300), train=False
            )
        results = (folder / "out" / "results.json").read_text(encoding="utf-8") if outcome.report else ""
        results = results.replace(str(folder), "")  # the path of the base recipe
        # The report states what is missing: runs that have no record, and decoding that was not measured.
        missing = [row for row in json.loads(results or "{}").get("runs", []) if row["outcome"] != "finished"]
        measured = sorted(path.name for path in folder.glob("out/decoding/*.json") if path.is_file())
        said = output.getvalue() + "\n".join(notes.lines) + f"{missing} {measured}"
        return Reading(digest(results), said)


class Artifacts(Target):
    """A packed model; its tensors and recipe are read."""

    name, patterns = "artifact", ("model.flm",)

    def make(self, folder: Path) -> None:
        tensors = {"w": matrix(normal_codes((40, 48), 6, 3.0), 6), "gain": torch.linspace(0, 1, 50)}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.flm").write_bytes(pack_small(tensors).content)

    def read(self, folder: Path, draw: random.Random) -> Reading:
        artifact = read_artifact(folder / "model.flm")
        return Reading(digest(artifact.tensors, dump_recipe(artifact.recipe), artifact.tokenizer.fingerprint))


_ALL = (Recipes(), Experiments(), Sources(), TokenizerFiles(), Prepared(), Runs(), Comparisons(), Artifacts())
TARGETS = {target.name: target for target in _ALL}
