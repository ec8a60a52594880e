"""Token-by-token decoding with the model's state."""

from collections.abc import Iterator

import torch

from fusedlm.generate.sampling import check_sampling, next_token_probabilities, sample
from fusedlm.generate.text import TextStream
from fusedlm.model.precision import autocast

_RESERVED_TOKENS = 2**16  # a state that may get longer grows as it goes: nobody means to fill max_tokens=1000000000


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

    The prompt, end-of-text before it as at the start of every training document, enters the model's state in one
    prefill; after that one token at a time. Ends at end-of-text (not part of the text) or after max_tokens.
    The draw is made on the CPU from one seeded generator, so that a seed gives the same text on every device, as far as
    the device's logits agree.

    Args:
        model: a decoder on `device`; it is put into eval mode while text is being generated.
        prompt: may be empty.
        max_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token.
        top_k, top_p: see `next_token_probabilities`.

    Returns:
        An iterator of non-empty pieces of text. Each is valid Unicode: bytes of a character that is not complete yet
        wait for the next token, and a character that never completes becomes U+FFFD.

    Raises:
        ValueError: at the call, a value is out of range; while iterating, the model's logits are not finite.
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
    generator = torch.Generator().manual_seed(seed)
    choice = (temperature, top_k, top_p, generator)
    return _stream(model, tokenizer, ids, max_tokens, choice, torch.device(device), dtype)


def _stream(model, tokenizer, ids, max_tokens, choice, device, dtype) -> Iterator[str]:
    temperature, top_k, top_p, generator = choice
    text = TextStream(tokenizer, ids)
    was_training = model.training
    model.eval()
    try:
        # The last token is never read back, hence the -1.
        reserved = len(ids) + max_tokens - 1
        state = model.init_state(1, max_tokens=reserved if reserved <= _RESERVED_TOKENS else None)
        for _ in range(max_tokens):
            # Rows that only pad the vocabulary lie beyond the tokenizer's ids.
            logits = _last_logits(model, ids, state, device, dtype)[: tokenizer.vocab_size]
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


# A function of its own, so that neither the disabled gradients nor autocast leak to the caller between two pieces.
@torch.no_grad()
def _last_logits(model, ids: list[int], state, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(vocab,) after feeding ids through the state."""
    with autocast(device, dtype):
        hidden = model.hidden(torch.tensor([ids], device=device), state=state)
        return model.head.logits(hidden[:, -1:])[0, -1].float()
