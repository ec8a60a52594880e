"""The base of the layers of a file for Transformers."""

import torch


class Module(torch.nn.Module):
    """A module whose parameters are allocated here, and filled by loading."""

    def add_parameter(self, name: str, shape: tuple[int, ...], start: float | None = None) -> None:
        """start: of an untrained model; None: drawn from N(0, 1 / columns)."""
        if start is None:
            value = torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 1.0)
        else:
            value = torch.full(shape, float(start))
        self.register_parameter(name, torch.nn.Parameter(value))

    def add_constant(self, name: str, value: float) -> None:
        """A number that is stored with the parameters."""
        self.add_buffer(name, (), value)

    def add_buffer(self, name: str, shape: tuple[int, ...], value: float) -> None:
        """A tensor of float32 or better that is stored with the parameters, and has no gradient."""
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer(name, torch.full(shape, value, dtype=dtype))


def decoder_forward(self, tokens, state=None, lengths=None):
    """The output of the last block, (B, T, dim).

    Args:
        tokens: (B, T) int64.
        state: from `init_state`, updated in place: the tokens follow those it has seen.
        lengths: with a state, how many of the T tokens each row has; the rest is padding. None: all.
    """
    n_new = [tokens.shape[1]] * tokens.shape[0] if lengths is None else lengths
    context = self._context(tokens, None, state, n_new, None)
    embedded = self.embedding(tokens)
    x = self._embed(embedded, tokens, context, {} if state is None else state.inputs)
    x = self._through_blocks(x, context, state)
    if state is not None:
        state.advance(context, None, n_new)
    return x
