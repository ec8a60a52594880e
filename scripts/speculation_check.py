"""Compare greedy texts with and without speculative decoding, of a small model of every mixer, in float32.

    python scripts/speculation_check.py [--tokens 2000] [--drafts 3] [--mixers gdn mla]

Weights are random, so that texts do not end in a loop of a few tokens. A third of the drafts are wrong on purpose, at
places that differ from row to row; the rest are right. The exit code is 0 if all texts are identical, 1 otherwise.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fusedlm.generation import Speculation  # noqa: E402
from fusedlm.generation.sampling import Sampling  # noqa: E402
from fusedlm.generation.speculation import SpeculativeSteps  # noqa: E402
from fusedlm.generation.steps import GrowingSteps, Predictor, Row  # noqa: E402
from fusedlm.model.precision import resolve_device  # noqa: E402
from fusedlm.testing import MIXER_CASES, part_model, randomise_  # noqa: E402

VOCAB, ROWS = 257, 2


class Guided(SpeculativeSteps):
    """Drafts are the tokens of the given texts, but for every third place."""

    texts: list[list[int]] = []

    def _draft(self, *arguments):
        carried = super()._draft(*arguments)
        for row, text in enumerate(self.texts):
            at = int(self._n_made_B[row]) + torch.arange(self._n_drafts)
            right = torch.tensor(text)[at.clamp(max=len(text) - 1)]
            self._drafts_BK[row] = torch.where((at + row) % 3 == 0, (right + 1) % VOCAB, right)
        return carried


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--drafts", type=int, default=3)
    parser.add_argument("--mixers", nargs="+", choices=MIXER_CASES, default=list(MIXER_CASES), metavar="MIXER")
    arguments = parser.parse_args()
    device = resolve_device("auto")
    same = [check(mixer, arguments.tokens, arguments.drafts, device) for mixer in arguments.mixers]
    print(f"{sum(same)} of {len(same)} mixers identical over {arguments.tokens:,} tokens of {ROWS} rows")
    return 0 if all(same) else 1


@torch.no_grad()
def check(mixer: str, tokens: int, drafts: int, device: torch.device) -> bool:
    torch.manual_seed(0)
    model = part_model(MIXER_CASES[mixer][0], vocab_size=VOCAB, extra="tie_embeddings: false, mtp: {depth: 1}")
    model = randomise_(model, scale=0.3).to(device).eval()
    predictor, sampling = Predictor(model, None, device, torch.float32), Sampling(tokens, 0.0, None, None)
    started = time.perf_counter()
    expected = _texts(GrowingSteps(predictor, sampling))
    speculation = Speculation(drafts)
    steps = Guided(predictor, sampling, ROWS, speculation, graph=False)
    steps.texts = expected
    found = _texts(steps)
    kinds = [len(set(text)) for text in expected]
    print(
        f"{mixer}: {'identical' if found == expected else 'DIFFERENT'}, {min(kinds)} to {max(kinds)} different tokens, "
        f"{speculation.tokens_per_step():.2f} tokens per step, {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    return found == expected


def _texts(steps) -> list[list[int]]:
    rows = [Row(i, [0, 10 + i, 20], torch.Generator().manual_seed(i)) for i in range(ROWS)]
    return [list(text) for text in zip(*steps.run(rows), strict=True)]


if __name__ == "__main__":
    sys.exit(main())
