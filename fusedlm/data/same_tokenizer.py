"""Whether two tokenizers give every text the same ids, by their content."""

from fusedlm.data.tokenizer import SubwordTokenizer, Tokenizer

# What the ids of a text depend on. Other parts are of special tokens, padding and the text around a template.
_PARTS = ("normalizer", "pre_tokenizer", "model")


def tokenizer_difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """In a few words, what differs; None: every text has the same ids, end-of-text included.

    Two files that differ in white space, in the order of their keys or in their post-processors are the same.
    """
    if one.fingerprint == other.fingerprint:
        return None
    if one.vocab_size != other.vocab_size:
        return f"{one.vocab_size} tokens, not {other.vocab_size}"
    if one.eot_id != other.eot_id:
        return f"end-of-text is {one.eot_id}, not {other.eot_id}"
    if not (isinstance(one, SubwordTokenizer) and isinstance(other, SubwordTokenizer)):
        return "one is of bytes"
    specs = one.spec(), other.spec()
    for part in _PARTS:
        if specs[0].get(part) != specs[1].get(part):
            return f"another {part.replace('_', '-')}"
    added = [{token["id"]: token["content"] for token in spec.get("added_tokens", ())} for spec in specs]
    return None if added[0] == added[1] else "other added tokens"
