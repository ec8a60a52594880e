"""The source files that read and score an artifact, as one archive: the code that a size limit on a model counts."""

import ast
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]  # the folder that holds the package

# The archive's entry. It is also what finds the files: those of fusedlm that it has imported when it ends.
SCORE = '''"""python score.py MODEL.flm TEXT.txt: bits per byte of a text, as one document."""
import sys

import torch

import fusedlm
from fusedlm.evaluate import default_stride, score_documents, text_documents


def score(model_path, text):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, recipe = fusedlm.load(model_path, device=device)
    window = recipe.train.seq_len
    return score_documents(
        model,
        text_documents(text, tokenizer),
        window=window,
        stride=default_stride(window),
        device=device,
        dtype=torch.float32,
    ).bpb


if __name__ == "__main__":
    with open(sys.argv[2], encoding="utf-8", newline="") as file:
        print(score(sys.argv[1], file.read()))
'''
_TRACE = """
import json, sys
sys.path[:0] = {paths!r}
from score import score
score({model!r}, "The quick brown fox.")
print(json.dumps([m.__file__ for n, m in sorted(sys.modules.items()) if n.partition(".")[0] == "fusedlm"]))
"""


def code_archive(artifact: bytes) -> bytes:
    """A .tar.xz with score.py and the modules of fusedlm that it imports to score a text with an artifact on this
    machine; the packages that fusedlm requires are not in it. The same files give the same bytes.

    Raises:
        ValueError: the artifact cannot be read or scored in a process of its own.
    """
    files = {"score.py": SCORE.encode()}
    for path in _imported(artifact):
        files[path.relative_to(_ROOT).as_posix()] = minified(path.read_text(encoding="utf-8")).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.mode = len(content), 0, 0o644
            archive.addfile(entry, io.BytesIO(content))
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)


class _Minify(ast.NodeTransformer):
    """Drops strings that are statements: docstrings, and the descriptions of fields."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [child for child in body if not _is_text(child)]
            if not node.body and not isinstance(node, ast.Module):
                node.body = [ast.Pass()]
        return node


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def minified(source: str) -> str:
    """The same program without comments and docstrings."""
    return ast.unparse(_Minify().visit(ast.parse(source)))


def _imported(artifact: bytes) -> list[Path]:
    """The files of fusedlm that score.py has imported when it ends."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model.flm")
        model.write_bytes(artifact)
        Path(folder, "score.py").write_text(SCORE, encoding="utf-8")
        trace = _TRACE.format(paths=[folder, str(_ROOT)], model=str(model))
        command = [sys.executable, "-c", trace]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"the artifact cannot be scored in a process of its own: {last}")
    return [Path(path) for path in json.loads(done.stdout.splitlines()[-1])]
