"""The tokenizer in the metadata of a GGUF file. llama.cpp has the splits of text before BPE in its code, by name."""

import json
from typing import Any

from fusedlm.data.byte_level import BYTE_OF
from fusedlm.data.pretokens import SPLIT, UNLIMITED
from fusedlm.data.tokenizer import END_OF_TEXT, ByteTokenizer, SubwordTokenizer, Tokenizer

_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # kinds of tokens
# The splits of llama.cpp that are read and written: patterns of a tokenizer.json, the first one of new files. dbrx is
# that of llama-bpe, which takes a token for a whole word even where merges would not give it.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    "dbrx": (UNLIMITED, SPLIT, rf"{_WORDS}\p{{N}}{{1,3}}{_REST}"),
    "qwen2": (rf"{_WORDS}\p{{N}}{_REST}",),
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def vocabulary(tokenizer: Tokenizer, n_rows: int) -> dict[str, Any]:
    """Metadata, without `tokenizer.ggml.` before the keys.

    Args:
        n_rows: of the embedding; tokens after those of the tokenizer are unused.

    Raises:
        ValueError: llama.cpp has no such tokenizer.
    """
    if isinstance(tokenizer, ByteTokenizer):
        tokens = dict(BYTE_OF.items())
        # llama.cpp wants a merge. This one never happens: merges start from single characters.
        merges, split = [f"{END_OF_TEXT} {END_OF_TEXT}"], "gpt-2"
        special = {END_OF_TEXT: tokenizer.eot_id}
    else:
        tokens, merges, split, special = _of_json(tokenizer)
    names = {i: token for token, i in (tokens | special).items()}
    ids = range(max(n_rows, tokenizer.vocab_size))
    kinds = [_CONTROL if names.get(i) in special else _NORMAL if i in names else _UNUSED for i in ids]
    found = {
        "model": "gpt2",
        "pre": split,
        "tokens": [names.get(i, f"[unused{i}]") for i in ids],
        "token_type": kinds,
        "merges": merges,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    return found | {f"{name}_token_id": tokenizer.eot_id for name in ("bos", "eos", "padding")}


def _of_json(tokenizer: SubwordTokenizer) -> tuple[dict[str, int], list[str], str, dict[str, int]]:
    spec = json.loads(tokenizer.files()["tokenizer.json"])
    model = spec["model"]
    if model["type"] != "BPE" or spec.get("normalizer") is not None or model.get("byte_fallback"):
        raise ValueError("tokenizer: llama.cpp reads byte-level BPE without normalisation; export it with --to hf")
    split = _split(spec.get("pre_tokenizer") or {})
    if split is None:
        raise ValueError("tokenizer: llama.cpp has no split of text like its pre_tokenizer; export it with --to hf")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    special = {token["content"]: token["id"] for token in spec.get("added_tokens", ())}
    return model["vocab"], merges, split, special | {tokenizer.end_of_text: tokenizer.eot_id}


def _split(stage: dict) -> str | None:
    if stage.get("type") == "ByteLevel":
        return "gpt-2" if stage.get("use_regex", True) and not stage.get("add_prefix_space") else None
    stages = stage.get("pretokenizers", [])
    if len(stages) != 2 or stages[1].get("type") != "ByteLevel" or stages[1].get("add_prefix_space"):
        return None
    first, byte_level = stages
    if first.get("type") == "Digits" and first.get("individual_digits") and byte_level.get("use_regex", True):
        return "smollm"
    if first.get("type") != "Split" or first.get("behavior") != "Isolated" or byte_level.get("use_regex", True):
        return None
    pattern = first["pattern"].get("Regex")
    return next((name for name, patterns in _PATTERNS.items() if pattern in patterns), None)


def tokenizer_json(vocab: dict[str, int], merges: list[str], split: str | None, special: dict[str, int]) -> str:
    """The content of a tokenizer.json that does what llama.cpp does.

    Args:
        vocab: ids of ordinary tokens. special: of others.
        split: its name in llama.cpp.

    Raises:
        ValueError: the split is not known here.
    """
    stages = {"gpt-2": _BYTE_LEVEL, "smollm": _sequence({"type": "Digits", "individual_digits": True}, _BYTE_LEVEL)}
    for name, patterns in _PATTERNS.items():
        first = {"type": "Split", "pattern": {"Regex": patterns[0]}, "behavior": "Isolated", "invert": False}
        stages[name] = _sequence(first, _BYTE_LEVEL | {"use_regex": False})
    if split not in stages:
        raise ValueError(f"must be one of {', '.join(stages)}")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    bpe |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    happening = [merge for merge in merges if "".join(merge.split(" ", 1)) in vocab]
    by_id = {i: token for token, i in special.items()}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in sorted(by_id.items())],
        "normalizer": None,
        "pre_tokenizer": stages[split],
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": bpe | {"vocab": vocab | special, "merges": happening},
    }
    return json.dumps(spec, ensure_ascii=False, indent=2) + "\n"


def _sequence(*stages: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": list(stages)}
