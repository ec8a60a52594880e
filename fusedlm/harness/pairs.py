"""Texts to tokens as lm-eval does it, with what its own back ends get wrong."""

Pair = tuple[list[int], list[int]]


def encode_pair(tokenizer, context: str, continuation: str) -> Pair:
    """Ids of a context, end-of-text first, and of its continuation, by the rules of lm-eval: spaces at the end of the
    context belong to the continuation, whose ids are those of both texts after the number of ids of the context.

    Where the last token of the context and the first of the continuation merge, the rule can leave no id at all, which
    lm-eval's back ends fail on; the ids after the common beginning are scored then.
    """
    begin = [tokenizer.eot_id]
    if not context:
        return begin, tokenizer.encode(continuation)
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces:
        context, continuation = context[:-n_spaces], context[-n_spaces:] + continuation
    own, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    if len(whole) <= len(own) and continuation:
        n = next((i for i, (a, b) in enumerate(zip(own, whole, strict=False)) if a != b), len(whole) - 1)
        return begin + whole[:n], whole[n:]
    return begin + own, whole[len(own) :]


def rolling_pairs(tokenizer, text: str, max_length: int) -> list[Pair]:
    """Windows over a text in which each token is scored once, with the most context that max_length allows; the first
    one after end-of-text, which is not scored itself."""
    ids, pairs, done = tokenizer.encode(text), [], 0
    while done < len(ids):
        end = min(done + max_length, len(ids))
        if done == 0:
            pairs.append(([tokenizer.eot_id], ids[:end]))
        else:
            first = max(0, end - max_length - 1)
            pairs.append((ids[first:done], ids[done:end]))
        done = end
    return pairs


def shortened(pair: Pair, max_length: int) -> Pair:
    """The last max_length + 1 ids: the last one is only predicted.

    Raises:
        ValueError: the continuation alone is longer than max_length.
    """
    context, continuation = pair
    if len(continuation) > max_length:
        raise ValueError(
            f"a continuation of {len(continuation)} tokens is longer than max_length={max_length}; raise --window"
        )
    return context[-(max_length + 1 - len(continuation)) :], continuation
