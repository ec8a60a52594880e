"""What a result of `probe_extend` says about the length of the context: how far it can be used, and with which YaRN."""

import numpy as np

TOLERANCE = 0.01  # relative, of bits per byte above those within the training length


def usable_context(result: dict) -> dict:
    """How far the context can be used as it is, and with the factor of YaRN that reaches furthest.

    A length is usable if bits per byte over each training length up to it are at most 1% above those within the first:
    more context should never cost anything. Positions hold nearly the same text, so that they can be compared.

    Args:
        result: of `probe_extend`.

    Returns:
        `as_it_is` (tokens), `yarn` (the smallest of the factors that reach furthest, or null if none reaches further
        than the model as it is), `with_yarn` (tokens), `cost` (bits per byte that this factor adds within the training
        length), `relative_cost`, `scored` (tokens of the longest windows).
    """
    plain, *stretched = [_by_length(result, curve) for curve in result["curves"]]
    trained = result["trained_length"]
    found = {
        "as_it_is": _reach(plain, plain[0]) * trained,
        "yarn": None,
        "with_yarn": None,
        "cost": None,
        "relative_cost": None,
        "scored": len(plain) * trained,
    }
    # What YaRN costs within the training length is stated apart, and does not shorten its reach.
    reaches = [(_reach(values, max(values[0], plain[0])), values[0]) for values in stretched]
    factors = [curve["yarn"] for curve in result["curves"][1:]]
    if reaches:
        # Of equal reach, the factor that costs least.
        best = max(range(len(reaches)), key=lambda i: (reaches[i][0], -reaches[i][1], -factors[i]))
        reach, near = reaches[best]
        if reach * trained > found["as_it_is"]:
            cost = float(near - plain[0])
            found |= {"yarn": factors[best], "with_yarn": reach * trained, "cost": cost}
            found["relative_cost"] = cost / float(plain[0])
    return found


def describe_usable(result: dict) -> str:
    """`usable_context` in words, with the figures."""
    found, trained = usable_context(result), result["trained_length"]
    near = _by_length(result, result["curves"][0])[0]
    as_it_is, scored = found["as_it_is"], found["scored"]
    limit = f"bits per byte stay within {TOLERANCE:.0%} of the {near:.4f} up to the training length"
    if scored == trained:
        return (
            f"No document is longer than 1× the training length of {_tokens(trained)}: whether a longer context can be "
            "used was not measured; give a longer text with --text."
        )
    if as_it_is == scored:
        return f"The context can be used as it is up to {_length(scored, trained)}, the longest scored: {limit}."
    first = f"The context can be used as it is up to {_length(as_it_is, trained)}: {limit}, and not beyond."
    if not result["rope"]:
        return f"{first} YaRN does not apply to this model."
    if found["yarn"] is None:
        tried = ", ".join(f"{curve['yarn']:g}" for curve in result["curves"][1:])
        return f"{first} No YaRN factor extends it (tried: {tried or 'none'})."
    end = ", the longest scored" if found["with_yarn"] == scored else ""
    return (
        f"{first} With YaRN factor {found['yarn']:g} (--yarn {found['yarn']:g}) up to "
        f"{_length(found['with_yarn'], trained)}{end}, at a cost of {found['cost']:+.4f} bits per byte "
        f"({found['relative_cost']:+.1%}) within the training length."
    )


def _by_length(result: dict, curve: dict) -> np.ndarray:
    """Bits per byte over each training length, (multiples,)."""
    n_bytes = np.array(result["bytes"], dtype=np.float64)
    multiple = result["ends"][-1] // result["trained_length"]
    bits = np.array(curve["bpb"]) * n_bytes
    return bits.reshape(multiple, -1).sum(1) / n_bytes.reshape(multiple, -1).sum(1)


def _reach(values: np.ndarray, near: float) -> int:
    """Training lengths before the first that is not usable."""
    bad = np.flatnonzero(values > near * (1 + TOLERANCE))
    return int(bad[0]) if len(bad) else len(values)


def _length(tokens: int, trained: int) -> str:
    return f"{_tokens(tokens)} ({tokens / trained:g}× the training length)"


def _tokens(n: int) -> str:
    return f"{n:,} token{'s' * (n != 1)}"
