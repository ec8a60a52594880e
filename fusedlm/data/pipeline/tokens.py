"""The tokenizer, and the tokens of the documents that are kept."""

import json
from collections.abc import Iterator

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupFilter

from fusedlm.data.corpus import Part
from fusedlm.data.lossless import REMEDY, change
from fusedlm.data.pipeline.reading import StoredDocuments
from fusedlm.data.pipeline.work import LENGTHS, Work, WorkStep
from fusedlm.data.preparation import recipe_tokenizer, refuse_end_of_text, stored_dtype, text_batches
from fusedlm.data.split import TRAIN, VALIDATION
from fusedlm.data.tokenizer import Tokenizer, load_tokenizer


def kept_documents(work: Work, task: int) -> Iterator[Document]:
    """The stored documents of a task that are not removed as duplicates."""
    stored = StoredDocuments(work)(None, task, work.n_tasks)
    yield from MinhashDedupFilter(str(work.folder / "remove"))(stored, task, work.n_tasks)


def split_of(document: Document) -> str:
    return VALIDATION if document.metadata["held_out"] else TRAIN


class MakeTokenizer(WorkStep):
    """Trains or reads the tokenizer of the recipe, on the documents in their order."""

    type = "tokens"
    name = "tokenizer"

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        tokenizer = recipe_tokenizer(self._work.config, self._parts)
        folder = self._work.folder / "tokenizer"
        folder.mkdir(exist_ok=True)
        tokenizer.save(folder)
        self._work.path("dtype").write_text(stored_dtype(tokenizer))

    def _parts(self, stage: str) -> Iterator[Part]:
        for task, group in enumerate(self._work.groups):
            for document in kept_documents(self._work, task):
                yield Part(split_of(document), document.text, group.source)


class Tokenize(WorkStep):
    """Writes, for each split, tokens of the documents with end-of-text first, their LENGTHS, and a count of those that
    the tokenizer changed."""

    type = "tokens"
    name = "tokenize"

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        work = self._work
        tokenizer = load_tokenizer(work.folder / "tokenizer")
        dtype = work.dtype
        eot = np.array([tokenizer.eot_id], dtype).tobytes()
        rows = {split: [] for split in (TRAIN, VALIDATION)}
        lossy = {"documents": 0, "first": None}
        with (
            work.path("tokens", f"{rank:05d}.{TRAIN}.bin").open("wb") as train,
            work.path("tokens", f"{rank:05d}.{VALIDATION}.bin").open("wb") as validation,
        ):
            files = {TRAIN: train, VALIDATION: validation}
            for batch in text_batches(kept_documents(work, rank)):
                encoded = tokenizer.encode_batch([document.text for document in batch])
                for document, ids in zip(batch, encoded, strict=True):
                    self.stat_update("tokens", value=len(ids))
                    split, raw = split_of(document), document.text.encode()
                    refuse_end_of_text(ids, tokenizer, document.id)
                    _check_loss(tokenizer, document, ids, raw, lossy)
                    files[split].write(eot + ids.astype(dtype).tobytes())
                    rows[split].append((len(ids) + 1, len(raw)))
        for split, own in rows.items():
            np.save(work.path("tokens", f"{rank:05d}.{split}.npy"), np.array(own, LENGTHS))
        work.path("tokens", f"{rank:05d}.json").write_text(json.dumps(lossy))


def _check_loss(tokenizer: Tokenizer, document: Document, ids: np.ndarray, raw: bytes, lossy: dict) -> None:
    """Refuse held-out text, and count training text, that the tokenizer changes."""
    held_out = document.metadata["held_out"]
    if tokenizer.keeps_text and not held_out:
        return
    found = change(raw, tokenizer.decode_bytes(ids))
    if found and held_out:
        raise ValueError(
            f"{document.id}: the tokenizer changes this held-out document at {found}; bits per byte would be wrong; "
            f"{REMEDY}"
        )
    if found:
        lossy["documents"] += 1
        lossy["first"] = lossy["first"] or f"{document.id} at {found}"

