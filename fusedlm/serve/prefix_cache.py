"""States of prompts that were read before, for prompts that begin with the same tokens."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fusedlm.model.rows import Row, Snapshot, snapshot_bytes, tensor_bytes


@dataclass(eq=False)
class Block:
    """The tokens after those of its parent, and their entries in the caches of all tokens. snapshot: of the other parts
    of the state after the last of them; None: decoding cannot continue here."""

    parent: "Block | None"
    ids: tuple[int, ...]
    tokens: list[torch.Tensor]
    snapshot: Snapshot | None = None
    children: dict[tuple[int, ...], "Block"] = field(default_factory=dict)

    def nbytes(self) -> int:
        return tensor_bytes(self.tokens) + (0 if self.snapshot is None else snapshot_bytes(self.snapshot))


@dataclass(frozen=True)
class Found:
    """row: the longest state that can be continued; None: there is none. n_known: tokens of the prompt that are in the
    tree, which may be more."""

    row: Row | None
    n_known: int


class PrefixCache:
    """A tree of blocks of `block_size` tokens, least recently used blocks dropped first.

    Prompts share the blocks of their common beginning, however many there are. The caches of keys, values and latents
    can be cut after every block. Windows and recurrent states cannot: they are copied (a snapshot) at some boundaries,
    which the caller chooses, and only there can a prompt continue. What is found is copied: a block may be dropped
    while sequences that began with it are still running.

    hits, misses: lookups that found a state, and that did not. hit_tokens: tokens that need not be read again.
    evicted: blocks dropped.
    """

    def __init__(self, max_bytes: int, block_size: int, snapshots: bool, version: Callable[[], object] | None = None):
        """
        Args:
            max_bytes: of all blocks and snapshots; 0: nothing is kept.
            snapshots: the model has parts that need them.
            version: of the weights; when it changes, everything is dropped. None: they never change.
        """
        self.max_bytes, self.block_size, self.snapshots = max_bytes, block_size, snapshots
        self._version, self._seen_version = version, version() if version else None
        self._root = Block(None, (), [])
        # Least recent first. Parents are touched after their children, so that the first is never a parent.
        self._blocks: OrderedDict[Block, int] = OrderedDict()  # and its bytes
        self.nbytes = self.n_snapshots = 0
        self.hits = self.misses = self.hit_tokens = self.evicted = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def clear(self) -> None:
        """Drop everything, as when the weights have changed."""
        self._root = Block(None, (), [])
        self._blocks.clear()
        self.nbytes = self.n_snapshots = 0

    def find(self, ids: Sequence[int], most: int) -> Found:
        """The longest state of at most `most` first tokens of ids."""
        if self.max_bytes <= 0:
            self.misses += 1
            return Found(None, 0)
        self._check_version()
        path = self._path(ids, most)
        n_known = len(path) * self.block_size
        while path and self.snapshots and path[-1].snapshot is None:
            path.pop()
        if not path:
            self.misses += 1
            return Found(None, n_known)
        self._touch(path)
        columns = zip(*(block.tokens for block in path), strict=True)
        snapshot = path[-1].snapshot if self.snapshots else []
        n = len(path) * self.block_size
        self.hits += 1
        self.hit_tokens += n
        return Found(Row(n, [torch.cat(list(column)) for column in columns], snapshot), n_known)

    def insert(
        self,
        ids: Sequence[int],
        take_tokens: Callable[[int, int], list[torch.Tensor]],
        snapshot: Snapshot | None,
    ) -> None:
        """Keep the state of ids, a multiple of block_size.

        Args:
            take_tokens: (first, last) -> copies of these tokens, of every cache of all tokens.
            snapshot: of the other parts after the last token; None: nothing can continue there.

        Raises:
            ValueError: the number of ids is not a multiple of block_size.
        """
        if len(ids) % self.block_size:
            raise ValueError(f"{len(ids)} tokens are not a multiple of block_size={self.block_size}")
        if self.max_bytes <= 0 or not ids:
            return
        self._check_version()
        path = self._path(ids, len(ids))
        missing = range(len(path) * self.block_size, len(ids), self.block_size)
        if missing:
            first = missing[0]
            taken = take_tokens(first, len(ids))
        for start in missing:
            parent = path[-1] if path else self._root
            part = slice(start - first, start - first + self.block_size)
            # Cloned: a view would keep all blocks of this prompt alive.
            block = Block(parent, tuple(ids[start : start + self.block_size]), [x[part].clone() for x in taken])
            parent.children[block.ids] = block
            self._account(block)
            path.append(block)
        if snapshot is not None and path[-1].snapshot is None:
            path[-1].snapshot = snapshot
            self.n_snapshots += 1
            self._account(path[-1])
        self._touch(path)
        self._evict()

    def _path(self, ids: Sequence[int], most: int) -> list[Block]:
        """The blocks with which ids begin."""
        path, block = [], self._root
        for end in range(self.block_size, most + 1, self.block_size):
            block = block.children.get(tuple(ids[end - self.block_size : end]))
            if block is None:
                break
            path.append(block)
        return path

    def _touch(self, path: list[Block]) -> None:
        for block in reversed(path):
            self._blocks.move_to_end(block)

    def _account(self, block: Block) -> None:
        self.nbytes += block.nbytes() - self._blocks.get(block, 0)
        self._blocks[block] = block.nbytes()

    def _evict(self) -> None:
        while self.nbytes > self.max_bytes:
            block, n_bytes = self._blocks.popitem(last=False)
            del block.parent.children[block.ids]
            self.nbytes -= n_bytes
            self.n_snapshots -= block.snapshot is not None
            self.evicted += 1

    def _check_version(self) -> None:
        if self._version is not None and (now := self._version()) != self._seen_version:
            self.clear()
            self._seen_version = now
