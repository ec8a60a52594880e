"""The bytes of byte-level vocabularies, which have printable characters for bytes (GPT-2)."""

from fusedlm.data.pretokens import cuts_at_line_ends

_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
_OTHERS = [byte for byte in range(256) if byte not in set(_PRINTABLE)]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


def byte_table(spec: dict, vocabulary: dict[str, int]) -> dict[int, bytes] | None:
    """The bytes of each id; None if the tokenizer does not decode byte by byte.

    Args:
        spec: content of a tokenizer.json.
        vocabulary: ids by token, added tokens included.
    """
    if (spec.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    added = _added(spec)
    table = {}
    for token, i in vocabulary.items():
        known = token not in added and all(character in BYTE_OF for character in token)
        table[i] = bytes(BYTE_OF[character] for character in token) if known else token.encode()
    return table


def keeps_text(spec: dict, vocabulary: dict[str, int]) -> bool:
    """Whether it is certain that every text decodes to itself: byte-level BPE that has every byte and changes nothing
    before it. False: unknown."""
    added = _added(spec)
    return (
        (spec.get("decoder") or {}).get("type") == "ByteLevel"
        and cuts_at_line_ends(spec)
        and all(character in vocabulary and character not in added for character in BYTE_OF)
        and all(token.isascii() for token in added)
        and not any(spec["model"].get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    )


def _added(spec: dict) -> set[str]:
    return {token["content"] for token in spec.get("added_tokens", ())}
