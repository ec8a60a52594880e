"""Token-by-token decoding with the model's state."""

from collections.abc import Iterator

import torch

from fusedlm.generate.sampling import check_sampling, next_token_probabilities, sample
from fusedlm.generate.text import TextStream
from fusedlm.model.precision import autocast

_RESERVED_TOKENS = 2**16  # a longer state grows as tokens come: max_tokens=1000000000 is rarely meant to be reached


def generate(
    model,
    tokenizer,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Iterator[str]:
    """Continue a prompt.

    One prefill reads end-of-text, which starts every training document, and the prompt; after it, one token per step.
    Generation ends at end-of-text (not part of the text) or after max_tokens. Tokens are drawn on the CPU from one
    seeded generator: a seed gives the same text on every device whose logits agree. Ids that the
    tokenizer has no token for are never drawn.

    Args:
        model: a decoder on `device`; in eval mode while text is generated.
        prompt: may be empty.
        max_tokens: most tokens to generate.
        temperature: 0 takes the most likely token.
        top_k, top_p: see `next_token_probabilities`.
        device, dtype: device of the model, dtype of autocast.

    Returns:
        An iterator of non-empty pieces of text, each valid Unicode: bytes of an incomplete character are held until the
        next token, and a character that is never completed becomes U+FFFD.

    Raises:
        ValueError: at the call, a value is out of range, or the tokenizer has ids that the model has not; while
            iterating, the model's logits are not finite.
    """
    check_sampling(temperature, top_k, top_p)
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed} does not fit in 64 bits")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid Unicode: lone surrogate at character {error.start}") from None
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
    if max(ids) >= model.vocab_size:
        raise ValueError(
            f"the prompt has token id {max(ids)}, which is not in the model's vocabulary of {model.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    generator = torch.Generator().manual_seed(seed)
    choice = (temperature, top_k, top_p, generator)
    return _stream(model, tokenizer, ids, max_tokens, choice, torch.device(device), dtype)


def _stream(model, tokenizer, ids, max_tokens, choice, device, dtype) -> Iterator[str]:
    temperature, top_k, top_p, generator = choice
    text = TextStream(tokenizer, ids)
    was_training = model.training
    model.eval()
    try:
        # The last token is not fed back, hence the -1.
        reserved = len(ids) + max_tokens - 1
        state = model.init_state(1, max_tokens=reserved if reserved <= _RESERVED_TOKENS else None)
        unused = torch.from_numpy(tokenizer.unused_ids(model.vocab_size)).to(device)
        for _ in range(max_tokens):
            logits = _last_logits(model, ids, state, device, dtype).index_fill(0, unused, -torch.inf)
            token = sample(next_token_probabilities(logits, temperature, top_k, top_p), generator)
            if token == tokenizer.eot_id:
                break
            if piece := text.add(token):
                yield piece
            ids = [token]
        if piece := text.finish():
            yield piece
    finally:
        model.train(was_training)


# Not in the generator: disabled gradients and autocast would stay on for the caller between two pieces.
@torch.no_grad()
def _last_logits(model, ids: list[int], state, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(vocab,) float32 logits after the last of ids, which are appended to the state."""
    last = torch.tensor([len(ids) - 1], device=device)
    with autocast(device, dtype):
        return model(torch.tensor([ids], device=device), state=state, select=last).logits[0].float()
