"""Text from a model: one prompt or many, at once or piece by piece."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal, overload

import torch

from fusedlm.generation.acceptance import Speculation
from fusedlm.generation.decode import BatchDecoder
from fusedlm.generation.sampling import Sampling, check_sampling
from fusedlm.generation.steps import Row
from fusedlm.model.precision import resolve_device, resolve_dtype


@overload
def generate(model, tokenizer, prompt: str, *, stream: Literal[False] = False, **options) -> str: ...
@overload
def generate(model, tokenizer, prompt: str, *, stream: Literal[True], **options) -> Iterator[str]: ...
@overload
def generate(model, tokenizer, prompt: Sequence[str], *, stream: Literal[False] = False, **options) -> list[str]: ...
@overload
def generate(
    model, tokenizer, prompt: Sequence[str], *, stream: Literal[True], **options
) -> Iterator[tuple[int, str]]: ...
def generate(
    model,
    tokenizer,
    prompt: str | Sequence[str],
    *,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stream: bool = False,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    cuda_graph: bool | None = None,
    compile: bool = False,
    speculate: int | Speculation | None = None,
):
    """Continue a prompt, or a list of prompts.

    One prefill reads end-of-text, which starts every training document, and the prompt; after it, one token per step.
    A text ends at end-of-text (not part of the text) or after max_tokens. On a CUDA device a step, with the choice of
    the token, is one CUDA graph, and the host reads the tokens of a step while the next one runs.

    Prompts of a list may differ in length and are decoded in batches, each row with its own length in the state, so
    that greedy decoding gives each the text that it has alone, up to rounding. The random numbers come from the CPU:
    prompt i has a generator of its own, with seed + i, so that its text depends neither on the other prompts nor on the
    batch size, and is the same on every device whose logits agree.

    Args:
        model: a decoder; in eval mode while text is generated.
        tokenizer: the one that it was trained with.
        prompt: a text, which may be empty, or a list of texts.
        max_tokens: most tokens to generate for each prompt.
        temperature: 0 takes the most likely token.
        top_k, top_p: see `next_token_probabilities`.
        seed: of sampling.
        stream: return an iterator instead of the text.
        batch_size: most prompts decoded together.
        device: of the model; None: where its parameters are.
        dtype: of autocast, or its name as in `recipe.runtime.dtype`; "auto": bfloat16 on CUDA devices, float32
            elsewhere.
        cuda_graph: whether a step is one CUDA graph; None: where the device and all layers of the model allow it.
        compile: the steps of a CUDA graph with torch.compile, which takes tens of seconds and pays for many tokens.
        speculate: drafts per step of speculative decoding, for models with multi-token prediction; or a `Speculation`,
            which also counts how many of them are kept. Greedy texts are the same up to rounding, sampled ones have the
            same distribution, but are others. None: one token per step.

    Returns:
        The continuation, without the prompt; a list of them for a list of prompts. With `stream` an iterator of
        non-empty pieces of text, each valid Unicode: bytes of an incomplete character are held until the next token,
        and a character that is never completed becomes U+FFFD. For a list of prompts, an iterator of pairs (index of
        the prompt, piece).

    Raises:
        ValueError: at the call, a value is out of range, a prompt is not text, or cuda_graph or compile is not possible
            here, or the model cannot draft; in decoding, the model's logits are not finite.
    """
    check_sampling(temperature, top_k, top_p)
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed} does not fit in 64 bits")
    known = getattr(model, "vocab_size", None)
    if known is not None and tokenizer.vocab_size > known:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids and the model {known}; use the run's tokenizer")
    alone = isinstance(prompt, str)
    prompts = [prompt] if alone else _listed(prompt)
    device = _device_of(model) if device is None else resolve_device(device)
    dtype = resolve_dtype(dtype, device) if isinstance(dtype, str) else dtype
    sampling = Sampling(max_tokens, temperature, top_k, top_p)
    speculation = speculate if isinstance(speculate, Speculation | None) else Speculation(speculate)
    decoder = BatchDecoder(model, tokenizer, sampling, device, dtype, cuda_graph, compile, speculation)
    for index, text in enumerate(prompts):
        _check_text(text, index)
    rows = [Row(i, [tokenizer.eot_id, *tokenizer.encode(text)], _generator(seed + i)) for i, text in enumerate(prompts)]
    rows.sort(key=lambda row: len(row.ids))  # less padding
    batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    pieces = _pieces(decoder, batches)
    if stream:
        return _without_index(pieces) if alone else pieces
    texts = [""] * len(prompts)
    for index, piece in pieces:
        texts[index] += piece
    return texts[0] if alone else texts


def _listed(prompts) -> list[str]:
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompt is a {type(prompts).__name__}; give a text or a list of texts")
    return list(prompts)


def _pieces(decoder: BatchDecoder, batches: list[list[Row]]) -> Iterator[tuple[int, str]]:
    for rows in batches:
        yield from decoder.decode(rows)


def _without_index(pieces: Iterator[tuple[int, str]]) -> Iterator[str]:
    with contextlib.closing(pieces):  # closing this one must end decoding at once
        for _, piece in pieces:
            yield piece


def _check_text(prompt, index: int) -> None:
    if not isinstance(prompt, str):
        raise ValueError(f"prompt {index} is a {type(prompt).__name__}, not text")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt {index} is not valid Unicode: lone surrogate at character {error.start}") from None


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed if seed < 2**64 else seed - 2**64)


def _device_of(model) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
