"""The text that a command scores: a file, or the text of a run."""

from pathlib import Path


def documents_of(path: Path | None, loaded, progress):
    """(documents, number of text tokens, text tokens of the longest) of a file, or of what a run held out."""
    if path is not None:
        documents, n_tokens = _file_documents(path, loaded.tokenizer)
        return documents, n_tokens, n_tokens
    shards = prepared_text(loaded, progress).validation
    return shards.documents(), shards.n_tokens - shards.n_documents, shards.longest


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


def prepared_text(loaded, progress):
    """The text that the run of a `LoadedRun` was trained with, by its fingerprint.

    Raises:
        ValueError: it is gone, has changed or is damaged.
    """
    from fusedlm.runs.text import open_text

    remedy = "name the folder of the prepared text with --data FOLDER, or give other text to score with --text FILE"
    prepared = open_text(loaded.recipe, loaded.text, loaded.run, remedy=remedy, progress=progress)
    if prepared.tokenizer.fingerprint != loaded.tokenizer.fingerprint:
        raise ValueError(
            f"{loaded.run}: its tokenizer is not the one of its text in {prepared.directory}; restore the tokenizer "
            "of the run, or give the text to score with --text FILE"
        )
    return prepared
