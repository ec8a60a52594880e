"""Train a GPT as nanoGPT trains it for some minutes on the text of a recipe, and score it as ours are scored.

    python benchmarks/nanogpt.py recipes/golf-27m.yaml --layers 9 --dim 512 --heads 8 --minutes 10 [--out FILE]

The model is GPT-2's as nanoGPT writes it (github.com/karpathy/nanoGPT): learnt positions, LayerNorm without bias, GELU,
tied embeddings, residual projections that start smaller by sqrt(2 * layers). Its defaults are kept: AdamW with betas
0.9 and 0.95 and decay 0.1 of all matrices, warm-up, then half a cosine to a tenth of --lr, norms of gradients clipped
to 1, torch.compile, bfloat16. The schedule follows the time that was spent, compilation included, so that it ends when
the minutes do. Text, tokenizer, sequence length and validation are those of the recipe; nothing else of it is used.
"""

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fusedlm import load_recipe  # noqa: E402
from fusedlm.data import prepare  # noqa: E402
from fusedlm.data.loader import Loader  # noqa: E402
from fusedlm.evaluate import score_documents  # noqa: E402
from fusedlm.files import write_atomic  # noqa: E402
from fusedlm.model.precision import autocast, resolve_device, resolve_dtype  # noqa: E402
from fusedlm.runs.hardware import environment  # noqa: E402

_WARM_UP = 0.01  # of the time
_MULTIPLE = 64  # of the padded vocabulary


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropped = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropped)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))), self.dropout, self.training)


class GPT(nn.Module):
    """(B, T) int64 -> (B, T, padded vocabulary) logits."""

    def __init__(self, vocab_size: int, seq_len: int, layers: int, dim: int, heads: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.embedding = nn.Embedding(-(-vocab_size // _MULTIPLE) * _MULTIPLE, dim)
        self.positions = nn.Embedding(seq_len, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                ends_branch = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if ends_branch else 0.02)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood of targets (B, T)."""
        logits = F.linear(self.hidden(tokens), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Scored:
    """A GPT as `score_documents` calls models."""

    def __init__(self, model: GPT, vocab_size: int):
        self.model, self.vocab_size, self.training = model, vocab_size, False

    def eval(self):
        self.model.eval()

    def train(self, mode: bool):
        self.model.train(mode)

    def __call__(self, tokens: torch.Tensor, select: torch.Tensor, targets: torch.Tensor) -> SimpleNamespace:
        x = self.model.hidden(tokens).flatten(0, 1)[select]
        logits = F.linear(x, self.model.embedding.weight)[:, : self.vocab_size]
        return SimpleNamespace(nll=F.cross_entropy(logits.float(), targets, reduction="none"), metrics={})


def learning_rate(peak: float, done: float) -> float:
    """At a fraction of the time: linear warm-up, then half a cosine to a tenth of the peak."""
    if done < _WARM_UP:
        return peak * done / _WARM_UP
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, (done - _WARM_UP) / (1 - _WARM_UP)))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=64, help="sequences per step")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_intermixed_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    device = resolve_device(recipe.runtime.device)
    dtype = resolve_dtype(recipe.runtime.dtype, device)
    data = prepare(recipe.data)
    record = {"name": "nanogpt", "command": shlex.join(["python", "benchmarks/nanogpt.py", *sys.argv[1:]])}
    record |= {"recipe": recipe.name, "environment": environment(device, dtype)}
    record |= run(arguments, data, recipe.train.seq_len, device, dtype)
    print(json.dumps({key: value for key, value in record.items() if key not in ("environment", "losses")}))
    if arguments.out:
        write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")


def run(arguments, data, seq_len: int, device: torch.device, dtype: torch.dtype) -> dict:
    """Train and score; the figures of the record."""
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    vocab_size = data.tokenizer.vocab_size
    sizes = (arguments.layers, arguments.dim, arguments.heads, arguments.dropout)
    model = GPT(vocab_size, seq_len, *sizes).to(device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    loss_of = model if arguments.no_compile else torch.compile(model)
    rows = {"seq_len": seq_len, "batch_size": arguments.batch_size}
    loader = Loader(data.train, **rows, seed=arguments.seed, document_mask=False, device=device)
    batches = iter(loader)
    budget, start, losses, step = 60 * arguments.minutes, time.perf_counter(), [], 0
    while (spent := time.perf_counter() - start) < budget:
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(arguments.lr, spent / budget)
        with autocast(device, dtype):
            loss = loss_of(batch.tokens, batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        # Reading the loss keeps the host at most one step ahead, so that the clock is that of the device.
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    loader.close()
    scores = [_score(model, data, seq_len, stride, device, dtype) for stride in (seq_len, seq_len // 2)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "tokens": step * arguments.batch_size * seq_len,
        "seconds": seconds,
        "losses": [sum(losses[i : i + 100]) / len(losses[i : i + 100]) for i in range(0, len(losses), 100)],
        "val_nll_per_token": scores[0].nll_per_token,
        "val_bpb": scores[0].bpb,
        "eval_bpb": scores[1].bpb,
    }


def _score(model: GPT, data, window: int, stride: int, device: torch.device, dtype: torch.dtype):
    """Of the validation text: without overlap as training validates, by half windows as `fusedlm eval` scores."""
    longest = data.validation.longest
    rows = {"window": window, "stride": stride, "longest": longest, "device": device, "dtype": dtype}
    return score_documents(Scored(model, data.tokenizer.vocab_size), data.validation.documents(), **rows)


if __name__ == "__main__":
    main()
