"""Token ids in a file that may be cut, replaced or overwritten while it is in use."""

import os
from pathlib import Path

import numpy as np

from fusedlm.data.manifest import damaged
from fusedlm.files import sha256_file


class TokenFile:
    """The ids of one shard: `len(file)`, and `file[start:stop]` reads ids as an array of the file's dtype.

    Every read opens the file. A mapping would be faster by microseconds, but reading what another process has cut off
    would end this process with SIGBUS. A read also compares size, time and inode with those at the start, and the
    checksum if they differ: a copy of the same content is accepted.

    Args:
        n_tokens: of the whole file.
        vocab_size: ids from here on are refused.
        sha256: of the whole file.

    Raises:
        DamagedData: on reading, the file is gone or has other content, or an id is outside the vocabulary.
        OSError: the system cannot read the file.
    """

    def __init__(self, path: Path, dtype: str, n_tokens: int, vocab_size: int, sha256: str):
        self.path = path
        self._dtype, self._n_tokens, self._vocab_size, self._sha256 = np.dtype(dtype), n_tokens, vocab_size, sha256
        self._stamp = _stamp(os.stat(path))

    def __len__(self) -> int:
        return self._n_tokens

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(self._n_tokens)
        if stop <= start:
            return np.empty(0, self._dtype)
        ids = np.empty(stop - start, self._dtype)
        try:
            descriptor = os.open(self.path, os.O_RDONLY)  # several times as fast as `open`
            try:
                self._check_unchanged(descriptor)
                read = _read_into(descriptor, memoryview(ids).cast("B"), start * self._dtype.itemsize)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            raise self._damaged("is missing: it was removed while in use") from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        if read != ids.nbytes:
            raise self._damaged("was cut while in use")
        if (largest := int(ids.max())) >= self._vocab_size:
            at = start + int(ids.argmax())
            raise self._damaged(f"has token id {largest} at {at}, outside the vocabulary of {self._vocab_size}")
        return ids

    def _check_unchanged(self, descriptor: int) -> None:
        stamp = _stamp(os.fstat(descriptor))
        if stamp == self._stamp:
            return
        if sha256_file(self.path) != self._sha256:
            raise self._damaged("was changed while in use")
        self._stamp = stamp

    def _damaged(self, what: str) -> ValueError:
        return damaged(self.path.parent, self.path.name, what)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _read_into(descriptor: int, target: memoryview, offset: int) -> int:
    """Fill the memory from a position in the file; the number of bytes read, fewer at the end of the file."""
    done = 0
    while done < len(target):
        read = os.preadv(descriptor, [target[done:]], offset + done)  # at most 2 GiB per call
        if read == 0:
            break
        done += read
    return done
