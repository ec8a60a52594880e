"""Which operators run."""

from torch.utils._python_dispatch import TorchDispatchMode


class RecordedOperators(TorchDispatchMode):
    """A context; `names` are the operators that ran in it, such as `aten.zeros.default`, autograd's own included."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))
