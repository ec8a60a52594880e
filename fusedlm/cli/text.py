"""The text that a command scores: a file, or what a run was given."""

from pathlib import Path


def file_documents(path: Path, tokenizer):
    """(documents, text tokens) of one file, which is one document."""
    from fusedlm.evaluate import text_documents

    try:
        text = path.read_bytes().decode("utf-8")  # not read_text, which would change line ends and with them the bytes
        documents = text_documents(text, tokenizer)
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path}: not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise ValueError(f"--text {path}: {error}") from None
    return documents, sum(len(tokens) - 1 for tokens, _ in documents)


def prepared_text(recipe, tokenizer, progress):
    """The prepared text of a run, made again where it is gone."""
    from fusedlm.data import prepare

    prepared = prepare(recipe.data, progress)
    if prepared.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{prepared.directory}: its tokenizer is not the one of the run, whose text has changed since; "
            "name the text to score with --text"
        )
    return prepared


def held_out(recipe, tokenizer, progress):
    """(documents, text tokens) of the validation text of a run."""
    shards = prepared_text(recipe, tokenizer, progress).validation
    return shards.documents(), shards.n_tokens - shards.n_documents
