"""A tokenizer as Transformers loads it, and back.

Every text begins with the end-of-text token, as every document did in training, and special tokens are not parsed in
text: "<|endoftext|>" in a text is ordinary characters, here as there.
"""

import json

from fusedlm.data.byte_level import BYTE_OF
from fusedlm.data.tokenizer import END_OF_TEXT, ByteTokenizer, SubwordTokenizer, Tokenizer

TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
# Inside a token the quotes are escaped, so that this is the key.
_UNSET = ('"post_processor":null', '"post_processor": null')


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, str]:
    """Content of the files by name.

    Args:
        max_length: tokens of the longest text that the model was trained for.
    """
    content, end_of_text = _tokenizer_json(tokenizer)
    special = {"bos_token": end_of_text, "eos_token": end_of_text, "pad_token": end_of_text}
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    return {TOKENIZER: content, TOKENIZER_CONFIG: _json(config), SPECIAL_TOKENS: _json(special)}


def restored_tokenizer(content: str, end_of_text: str, fingerprint: str | None) -> Tokenizer:
    """The tokenizer of a tokenizer.json: the very one that was exported, if its fingerprint is given and fits.

    Raises:
        ValueError: as `SubwordTokenizer`.
    """
    if fingerprint == ByteTokenizer.fingerprint and content == _tokenizer_json(ByteTokenizer())[0]:
        return ByteTokenizer()
    found = SubwordTokenizer(content, end_of_text)
    added = _added_beginning(end_of_text, found.eot_id)
    for unset in _UNSET if fingerprint is not None and added in content else ():
        before = SubwordTokenizer(content.replace(added, unset), end_of_text)
        if before.fingerprint == fingerprint:
            return before
    return found


def _tokenizer_json(tokenizer: Tokenizer) -> tuple[str, str]:
    """(tokenizer.json, end-of-text token)."""
    if isinstance(tokenizer, ByteTokenizer):
        return _with_beginning(_json(_bytes_spec(tokenizer.eot_id)), END_OF_TEXT, tokenizer.eot_id), END_OF_TEXT
    content, end_of_text = tokenizer.files()[TOKENIZER], tokenizer.end_of_text
    spec = json.loads(content)
    model = spec.get("model") or {}
    known = any(t["content"] == end_of_text and t.get("special") for t in spec.get("added_tokens", ()))
    changed = any(spec.get(key) is not None for key in ("padding", "truncation", "post_processor"))
    if not known or changed or model.get("dropout") or not any(unset in content for unset in _UNSET):
        # As our tokenizer reads it.
        added = [token for token in spec.get("added_tokens", ()) if token["content"] != end_of_text]
        spec |= {"added_tokens": sorted([*added, _special(end_of_text, tokenizer.eot_id)], key=lambda t: t["id"])}
        spec |= {"padding": None, "truncation": None, "post_processor": None}
        if model.get("dropout"):
            spec["model"] = model | {"dropout": None}
        content = _json(spec)
    return _with_beginning(content, end_of_text, tokenizer.eot_id), end_of_text


def _with_beginning(content: str, end_of_text: str, eot_id: int) -> str:
    """The JSON with a post-processor, every other character as it was."""
    unset = next(unset for unset in _UNSET if unset in content)
    return content.replace(unset, _added_beginning(end_of_text, eot_id))


def _added_beginning(end_of_text: str, eot_id: int) -> str:
    """The post-processor that puts end-of-text before each text."""
    token = {"SpecialToken": {"id": end_of_text, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    special = {end_of_text: {"id": end_of_text, "ids": [eot_id], "tokens": [end_of_text]}}
    pair = [token, first, {"SpecialToken": {"id": end_of_text, "type_id": 1}}, second]
    template = {"type": "TemplateProcessing", "single": [token, first], "pair": pair, "special_tokens": special}
    return f'"post_processor": {json.dumps(template, ensure_ascii=False)}'


def _bytes_spec(eot_id: int) -> dict:
    """Byte-level BPE without merges: a token for each byte."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(END_OF_TEXT, eot_id)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(BYTE_OF.items(), key=lambda item: item[1])),
            "merges": [],
        },
    }


def _special(token: str, token_id: int) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": token, **flags}


def _json(tree) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
