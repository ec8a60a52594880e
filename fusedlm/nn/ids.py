"""Token ids that a model has no token for."""

import torch


def check_ids(name: str, ids: torch.Tensor, vocab_size: int, ignored: int | None = None) -> None:
    """Check ids where it is free: on the CPU, outside of compilation. On a GPU it would wait for the device.

    Args:
        name: of the argument, for the message.
        ids: any shape, of integers.
        ignored: a value that stands for no token.

    Raises:
        ValueError: an id is negative or not below vocab_size, such as one of a padding row of the embedding.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or type(ids) is not torch.Tensor or not ids.numel():
        return
    low, high = map(int, torch.aminmax(ids))
    if low < 0 and ignored is not None:
        ids = torch.where(ids == ignored, 0, ids)
        low = int(ids.min())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name}: id {low if low < 0 else high} is not in the model's vocabulary of {vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
