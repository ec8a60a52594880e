"""Serving: times to tokens, throughput and the prefix cache, over HTTP; and lm-eval's requests a second.

    python benchmarks/serving.py [--recipe hybrid-350m [key=value ...]] [--parts clients prefix harness] [--out FILE]

Weights are random. `clients`: so many clients at once, each with one streamed request after another, against the same
requests one by one. `prefix`: requests that share a long beginning, one after another, with and without the prefix
cache. `harness`: pairs of few long contexts and many continuations, against lm-eval's `hf` back end with batch size 1
on the exported model.

On the CPU without --recipe: a hybrid of width 128, and a beginning of 1,024 instead of 8,192 tokens.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fusedlm import build_model, load_recipe  # noqa: E402
from fusedlm.config.model import ModelConfig  # noqa: E402
from fusedlm.data.tokenizer import ByteTokenizer  # noqa: E402
from fusedlm.files import write_atomic  # noqa: E402
from fusedlm.model.precision import resolve_device, resolve_dtype  # noqa: E402
from fusedlm.runs.hardware import environment  # noqa: E402
from fusedlm.serve import Choosing, Engine, Limits  # noqa: E402
from fusedlm.serve.app import AppOptions, make_app  # noqa: E402
from fusedlm.serve.engine import default_chunk  # noqa: E402
from fusedlm.serve.process import ProcessWorker  # noqa: E402
from fusedlm.serve.requests import Sequence  # noqa: E402
from fusedlm.serve.server import Server, bind  # noqa: E402

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PARTS = ("clients", "prefix", "harness")
SMALL = """
dim: 128
n_layers: 4
pattern: gggf
tie_embeddings: false
blocks:
  g: {mixer: {type: gdn, n_heads: 4}, ffn: {type: swiglu, hidden: 256}}
  f: {mixer: {type: attention, n_heads: 4, n_kv_heads: 2, rope_dim: 16, qk_gain: dim}, ffn: {type: swiglu, hidden: 256}}
"""


def make_engine(args, context: int, cache_bytes: int) -> Engine:
    model = make_model(args)
    limits = Limits(context, args.clients, waiting=10_000, chunk=args.chunk, cache_bytes=cache_bytes)
    return Engine(model, ByteTokenizer(), limits, device=args.device, dtype=args.dtype)


class Serving:
    """A server in a thread, with the engine in a process of its own as `fusedlm serve` has it, and another process for
    the clients."""

    def __init__(self, build: Callable[[], Engine]):
        self.worker = ProcessWorker(build)
        self._clients = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._listening = bind("127.0.0.1", 0)
        self.port = self._listening.getsockname()[1]
        self._server = Server(make_app(self.worker, AppOptions("bench")), grace=0)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listening]}, daemon=True)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def serve(self, requests: list[tuple[list[int], int]], n_clients: int) -> tuple[list, float]:
        """As `closed_loop`."""
        return self._clients.submit(_clients, self.port, requests, n_clients).result()

    def counts(self) -> dict[str, int]:
        return self.worker.call(_counts).result()

    def __exit__(self, *exception):
        self._clients.shutdown()
        self._server.should_exit = True
        self._thread.join()
        self._listening.close()


def _counts(engine: Engine) -> dict[str, int]:
    return {
        "graphed_steps": engine.graphed_steps,
        "graphed_prompts": engine.graphed_prompts,
        "cached_tokens": engine.metrics.cached_tokens,
    }


async def stream(port: int, prompt: list[int], n_tokens: int) -> list[float]:
    """Seconds from the request to each of its tokens."""
    body = {"prompt": prompt, "max_tokens": n_tokens, "ignore_eos": True, "stream": True, "logprobs": 0, "seed": 0}
    raw = json.dumps(body).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(raw)
    writer.write(head + raw)
    times = []
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            choice = json.loads(line[6:])["choices"][0]
            n = len(choice["logprobs"]["tokens"]) if choice["logprobs"] else 0
            times += [time.perf_counter() - began] * n
    writer.close()
    if len(times) != n_tokens:
        raise RuntimeError(f"{len(times)} tokens came, not {n_tokens}")
    return times


async def closed_loop(port: int, requests: list[tuple[list[int], int]], n_clients: int) -> tuple[list, float]:
    """The times of all requests, by so many clients, and the seconds of all."""
    left, found = iter(requests), []

    async def client():
        for prompt, n in left:
            found.append(await stream(port, prompt, n))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(n_clients)))
    return found, time.perf_counter() - began


def _clients(port: int, requests: list[tuple[list[int], int]], n_clients: int) -> tuple[list, float]:
    return asyncio.run(closed_loop(port, requests, n_clients))


def without_http(engine: Engine, requests: list[tuple[list[int], int]]) -> float:
    """Tokens per second of the engine alone, with all requests queued at once."""
    choosing = Choosing(logprobs=0)
    sequences = [
        Sequence(engine.tokenizer, ids, choosing, max_tokens=n, seed=0, ignore_eot=True) for ids, n in requests
    ]
    began = time.perf_counter()
    engine.submit(sequences)
    while not engine.is_idle:
        engine.step()
    return sum(n for _, n in requests) / (time.perf_counter() - began)


def figures(times: list[list[float]], seconds: float) -> dict:
    first = [own[0] for own in times]
    between = [b - a for own in times for a, b in zip(own, own[1:], strict=False)]

    def quantiles(values: list[float]) -> dict:
        cuts = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else values * 19
        return {"p50": cuts[9], "p95": cuts[18]}

    n_tokens = sum(map(len, times))
    found = {"tokens": n_tokens, "tokens_per_second": n_tokens / seconds, "first_token_seconds": quantiles(first)}
    return found | ({"between_tokens_seconds": quantiles(between)} if between else {})


def random_ids(generator: random.Random, n: int) -> list[int]:
    return [ByteTokenizer.eot_id, *generator.choices(range(256), k=n - 1)]


def clients_part(args) -> dict:
    generator, found = random.Random(0), {}
    lengths = [(generator.randrange(16, args.prompt * 2), args.tokens) for _ in range(args.clients * args.rounds)]
    context = args.prompt * 2 + args.tokens
    with Serving(partial(make_engine, args, context, 0)) as serving:
        for name, n_clients, n in (("together", args.clients, len(lengths)), ("one by one", 1, args.clients // 4)):
            requests = [(random_ids(generator, length), tokens) for length, tokens in lengths[:n]]
            serving.serve(requests[: max(4, n_clients)], n_clients)  # warm-up, with all sizes of a step
            found[name] = figures(*serving.serve(requests, n_clients))
            show(name, found[name])
        found |= {name: serving.counts()[name] for name in ("graphed_steps", "graphed_prompts")}
    engine = make_engine(args, context, 0)
    requests = [(random_ids(generator, length), tokens) for length, tokens in lengths]
    without_http(engine, requests[: args.clients])
    found["engine_tokens_per_second"] = without_http(engine, requests)
    print(f"  the engine without HTTP: {found['engine_tokens_per_second']:,.0f} tokens/s")
    found["speedup"] = found["together"]["tokens_per_second"] / found["one by one"]["tokens_per_second"]
    print(f"  {found['speedup']:.1f} times the throughput of one by one")
    return found


def prefix_part(args) -> dict:
    generator, found = random.Random(1), {}
    shared = random_ids(generator, args.prefix)
    requests = [(shared + generator.choices(range(256), k=32), 8) for _ in range(args.repeats)]
    for name, cache_bytes in (("without cache", 0), ("with cache", 2**34)):
        with Serving(partial(make_engine, args, args.prefix + 64, cache_bytes)) as serving:
            # The first two fill the cache: where their prompts part is known after the second.
            serving.serve(requests[:2], 1)
            found[name] = figures(*serving.serve(requests[2:], 1))
            found[name] |= {key: serving.counts()[key] for key in ("cached_tokens", "graphed_prompts")}
            show(name, found[name])
    before, after = (found[name]["first_token_seconds"]["p50"] for name in ("without cache", "with cache"))
    found["speedup"] = before / after
    print(f"  first token {before / after:.1f} times as fast with a shared beginning of {args.prefix:,} tokens")
    return found


def harness_part(args) -> dict:
    """On a hybrid of its own, which Transformers has a class for (Qwen3.5)."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    import fusedlm
    from fusedlm.cli import main
    from fusedlm.export import export_run
    from fusedlm.harness.model import RunModel

    generator = random.Random(2)
    words = ["state", "union", "people", "the", "of", "and", "year", "law"]
    shots = " ".join(generator.choices(words, k=args.context // 5))
    pairs = [
        (f"{shots} question {i}:", " " + " ".join(generator.choices(words, k=3)))
        for i in range(args.questions)
        for _ in range(4)
    ]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("\n---\n".join(" ".join(generator.choices(words, k=200)) for _ in range(40)))
        tree = {
            "name": "bench",
            "model": yaml.safe_load(SMALL),
            "data": {"source": {"type": "text", "path": str(text), "separator": "---"}},
            "train": {"steps": 1, "seq_len": 2 * args.context, "batch_size": 1, "eval_every": 0},
            "runtime": {"device": args.device.type},
        }
        tree["data"] |= {"dir": f"{folder}/prepared", "split": {"type": "hash", "fraction": 0.3}}
        Path(folder, "r.yaml").write_text(yaml.safe_dump(tree))
        if main(["train", f"{folder}/r.yaml", "--out", f"{folder}/run"]):
            raise RuntimeError("training failed")
        export_run(Path(folder, "run"), Path(folder, "hf"))
        model, tokenizer, _ = fusedlm.load(f"{folder}/run", device=args.device)
        ours = RunModel(model, tokenizer, 2 * args.context, device=args.device, dtype=torch.float32, quiet=True)
        theirs = HFLM(pretrained=f"{folder}/hf", device=str(args.device), dtype="float32", batch_size=1)
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]
    found = {"requests": len(pairs), "context_tokens": len(tokenizer.encode(pairs[0][0]))}
    values = {}
    for name, back_end in (("fusedlm", ours), ("hf", theirs)):
        back_end.loglikelihood(requests[:4], disable_tqdm=True)
        began = time.perf_counter()
        values[name] = back_end.loglikelihood(requests, disable_tqdm=True)
        found[f"{name}_requests_per_second"] = len(pairs) / (time.perf_counter() - began)
    found["largest_difference"] = max(abs(a[0] - b[0]) for a, b in zip(*values.values(), strict=True))
    found["same_greedy"] = all(a[1] == b[1] for a, b in zip(*values.values(), strict=True))
    found["speedup"] = found["fusedlm_requests_per_second"] / found["hf_requests_per_second"]
    ours_rate, their_rate = found["fusedlm_requests_per_second"], found["hf_requests_per_second"]
    print(
        f"  contexts of {found['context_tokens']:,} tokens: {ours_rate:.2f} requests per second, hf {their_rate:.2f}; "
        f"largest difference {found['largest_difference']:.1e}"
    )
    return found


def show(name: str, found: dict) -> None:
    first, between = found["first_token_seconds"], found["between_tokens_seconds"]
    print(
        f"  {name}: {found['tokens_per_second']:,.0f} tokens/s; first token p50 {first['p50'] * 1e3:.1f} ms, p95 "
        f"{first['p95'] * 1e3:.1f}; between tokens p50 {between['p50'] * 1e3:.2f} ms, p95 {between['p95'] * 1e3:.2f}",
        flush=True,
    )


def make_model(args):
    if args.recipe is None:
        config = ModelConfig.model_validate(yaml.safe_load(SMALL))
    else:
        config = load_recipe(RECIPES / f"{args.recipe}.yaml", args.overrides).model
    # Weights as at the start, but for projections that start at zero.
    model = build_model(config, vocab_size=ByteTokenizer.vocab_size, device=args.device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def main_() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", help="of recipes/, whose model is served")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="requests of each client")
    parser.add_argument("--prompt", type=int, default=128, help="mean tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="generated per request")
    parser.add_argument("--chunk", type=int, help="tokens of prompts between two steps; default: that of fusedlm serve")
    parser.add_argument("--prefix", type=int, help="tokens of the shared beginning (default: 8192, on the CPU 1024)")
    parser.add_argument("--repeats", type=int, default=10, help="requests with it")
    parser.add_argument("--context", type=int, default=1024, help="tokens of the contexts of lm-eval, about")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.device = resolve_device(args.device)
    args.dtype = resolve_dtype("auto", args.device)
    args.chunk = args.chunk or default_chunk(args.device)
    args.prefix = args.prefix or (1024 if args.device.type == "cpu" else 8192)
    result = {"recipe": args.recipe, "overrides": args.overrides, "dtype": str(args.dtype)}
    result["environment"] = environment(args.device, args.dtype)
    for part in args.parts:
        print(part)
        result[part] = {"clients": clients_part, "prefix": prefix_part, "harness": harness_part}[part](args)
    if args.out is not None:
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main_())
