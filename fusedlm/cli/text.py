"""The text that a command scores: a file, or the text of a run."""

from pathlib import Path


def documents_of(path: Path | None, recipe, tokenizer, progress):
    """(documents, number of text tokens) of a file, or of the validation text of a run."""
    if path is not None:
        return _file_documents(path, tokenizer)
    shards = prepared_text(recipe, tokenizer, progress).validation
    return shards.documents(), shards.n_tokens - shards.n_documents


def _file_documents(path: Path, tokenizer):
    """(documents, number of text tokens) of a file, as one document."""
    from fusedlm.data.text_files import read_text_file
    from fusedlm.evaluate import text_documents

    path = path.expanduser()
    try:
        documents = text_documents(read_text_file(path), tokenizer)
    except ValueError as error:
        raise ValueError(f"--text {path}: {str(error).removeprefix(f'{path}: ')}") from None
    return documents, sum(len(tokens) - 1 for tokens, _ in documents)


def prepared_text(recipe, tokenizer, progress):
    """The prepared text of a run; prepared again if it is missing."""
    from fusedlm.data import prepare

    prepared = prepare(recipe.data, progress)
    if prepared.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{prepared.directory}: not the tokenizer of the run, so the text has changed since training; "
            "give the text to score with --text"
        )
    return prepared
