"""fusedlm serve: an HTTP server for the model of a run."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli.common import (
    CheckpointOption,
    DeviceOption,
    ModelArgument,
    RuntimeArgument,
    WeightsOption,
    YaRNOption,
    integer,
    load_run,
    number,
    stretch,
)

_MIB = 2**20


def _integer_option(help: str, metavar: str = "N"):
    return typer.Option(parser=integer, metavar=metavar, help=help, show_default=True)


def serve(
    run: ModelArgument,
    overrides: RuntimeArgument = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, _integer_option("Port; 0: a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model (default: that of the folder).", show_default=False)
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            parser=integer,
            metavar="N",
            help="Most tokens of a prompt with its continuation (default: the training length, with --yarn times it).",
            show_default=False,
        ),
    ] = None,
    sequences: Annotated[int, _integer_option("Sequences decoded together.")] = 16,
    waiting: Annotated[int, _integer_option("Sequences that may wait; further requests get status 429.")] = 256,
    chunk: Annotated[
        int | None,
        typer.Option(
            parser=integer,
            metavar="N",
            help="Tokens of prompts read between two decoding steps (default: 512, on a GPU 2048).",
            show_default=False,
        ),
    ] = None,
    cache_mib: Annotated[int, _integer_option("Memory of the prefix cache; 0: none.", "MIB")] = 256,
    block_size: Annotated[int, _integer_option("Tokens of a block of the prefix cache.")] = 64,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Jinja template of chats (default: chat_template.jinja in the run folder).",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Clients must send the key in this file.", show_default=False),
    ] = None,
    max_body_mib: Annotated[int, _integer_option("Largest body of a request.", "MIB")] = 4,
    grace: Annotated[
        float,
        typer.Option(parser=number, metavar="S", help="Seconds that running requests have to finish at SIGTERM."),
    ] = 30.0,
    cuda_graph: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graph/--no-cuda-graph",
            help="Run a decoding step as one CUDA graph; default: on a GPU, where the model allows it.",
            show_default=False,
        ),
    ] = None,
    yarn: YaRNOption = None,
    checkpoint: CheckpointOption = "last",
    weights: WeightsOption = "raw",
    device: DeviceOption = "auto",
) -> None:
    """Serve the model of RUN over HTTP, with the endpoints of OpenAI and a page to try it."""
    for option, value, least in (("grace", grace, 0), ("max-body-mib", max_body_mib, 1), ("cache-mib", cache_mib, 0)):
        if not least <= value < 2**40:
            raise ValueError(f"--{option} {value:g} must be at least {least}")
    try:
        from fusedlm.serve.app import AppOptions, make_app
        from fusedlm.serve.chat import read_template
        from fusedlm.serve.server import Server, bind
    except ModuleNotFoundError as error:
        raise ValueError(f"fusedlm serve needs {error.name}: pip install 'fusedlm[serve]'") from None
    from fusedlm.serve.process import ProcessWorker

    key = None if api_key_file is None else _read_key(api_key_file)
    build = partial(
        _engine, run, overrides, yarn=yarn, checkpoint=checkpoint, weights=weights, device=device, context=context,
        sequences=sequences, waiting=waiting, chunk=chunk, cache_bytes=cache_mib * _MIB, block_size=block_size,
        cuda_graph=cuda_graph,
    )  # fmt: skip
    with bind(host, port) as listening:
        worker = ProcessWorker(build)
        try:
            template = read_template(run, chat_template, worker.facts.tokenizer)
            options = AppOptions(name or run.resolve().name, template, key, max_body_mib * _MIB)
            server = Server(make_app(worker, options), grace=grace)
            where, bound = (f"[{host}]" if ":" in host else host), listening.getsockname()[1]
            print(f"serving {options.name} at http://{where}:{bound}, context {worker.facts.context}", flush=True)
            server.run(sockets=[listening])
        finally:
            worker.stop()


def _engine(
    run, overrides, *, yarn, checkpoint, weights, device, context, sequences, waiting, chunk, cache_bytes, block_size,
    cuda_graph,
):  # fmt: skip
    """The engine that the options ask for, in the process that runs it."""
    from fusedlm.serve import Engine, Limits
    from fusedlm.serve.engine import default_chunk

    loaded = load_run(run, checkpoint=checkpoint, weights=weights, device=device, overrides=overrides, files=True)
    stretch(loaded.model, loaded.recipe, yarn)
    if context is None:
        context = int(loaded.recipe.train.seq_len * max(1.0, yarn or 1.0))
    if chunk is None:
        chunk = default_chunk(loaded.device)
    limits = Limits(context, sequences, waiting, chunk, cache_bytes, block_size)
    return Engine(
        loaded.model, loaded.tokenizer, limits, device=loaded.device, dtype=loaded.dtype, cuda_graph=cuda_graph
    )


def _read_key(path: Path) -> str:
    try:
        key = path.expanduser().read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        key = ""
    if not key.isascii() or not key.isprintable() or not key:
        raise ValueError(f"--api-key-file {path}: must hold one line of printable ASCII")
    return key
