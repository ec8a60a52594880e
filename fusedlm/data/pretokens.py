"""The pre-tokens of byte-level BPE: where text is cut before pairs are merged."""

import re
from collections.abc import Iterator

# Characters of the longest pre-token. Training takes a time that grows with the square of its length; ordinary words,
# indentation and lines of dashes are shorter, and their tokens do not depend on the limit.
LONGEST = 256

# The split of cl100k_base (tiktoken): contractions, a word with the character before it, up to three digits,
# punctuation with the line ends after it, white space. On English a token holds about 1% more text than with GPT-2's
# split, at the same speed.
_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}@|\p{N}{1,3}| ?[^\s\p{L}\p{N}]@[\r\n]#|\s#[\r\n]@|\s@(?!\S)|\s@"
)
SPLIT = _SPLIT.replace("@", f"{{1,{LONGEST}}}").replace("#", f"{{0,{LONGEST}}}")
UNLIMITED = _SPLIT.replace("@", "+").replace("#", "*")  # of tokenizers that were trained before there was a limit
# These splits and GPT-2's always cut between a single line end and a letter.
_PIECE_END = re.compile(r"(?<=[!-~])\n(?=[A-Za-z])")
_PIECE_CHARACTERS = 1 << 17


def pieces(text: str) -> Iterator[str]:
    """Cut a long text where the pre-tokenizer also cuts: bounds memory, and one document can use every core."""
    start = 0
    while len(text) - start > 2 * _PIECE_CHARACTERS:
        match = _PIECE_END.search(text, start + _PIECE_CHARACTERS)
        if match is None:
            break
        yield text[start : match.end()]
        start = match.end()
    yield text[start:] if start else text


def cuts_at_line_ends(spec: dict) -> bool:
    """Whether pieces encode to the tokens of the full text: true for the splits of GPT-2 and of `train_bpe`.

    Args:
        spec: content of a tokenizer.json.
    """
    if spec.get("normalizer") is not None or (spec.get("model") or {}).get("type") != "BPE":
        return False
    if any("\n" in t["content"] or t.get("lstrip") or t.get("rstrip") for t in spec.get("added_tokens", ())):
        return False
    stage = spec.get("pre_tokenizer") or {}
    if stage.get("type") == "ByteLevel":
        return bool(stage.get("use_regex", True)) and not stage.get("add_prefix_space")
    stages = stage.get("pretokenizers", [])
    return (
        len(stages) == 2
        and stages[0].get("pattern") in ({"Regex": SPLIT}, {"Regex": UNLIMITED})
        and stages[0].get("behavior") == "Isolated"
        and not stages[0].get("invert")
        and stages[1].get("type") == "ByteLevel"
        and not stages[1].get("add_prefix_space")
    )
