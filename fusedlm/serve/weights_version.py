"""Whether the weights of a model have changed."""

from torch import nn


class WeightsVersion:
    """Called, a number that changes when a parameter is written to or replaced, or the rotary embedding is stretched.

    Walking all modules takes a millisecond, so their list is kept; `refresh` notices modules that were replaced.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self.refresh()

    def refresh(self) -> int:
        """The number, of the modules that the model has now."""
        self._owners = [
            (module._parameters, name)
            for module in self._model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        return self()

    def __call__(self) -> int:
        parameters = (owner[name] for owner, name in self._owners)
        return hash((self._model.yarn, *((parameter.data_ptr(), parameter._version) for parameter in parameters)))
