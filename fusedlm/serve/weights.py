"""Whether the weights of a model have changed."""

import weakref


class WeightsVersion:
    """Called, a number that is one more than at the last call when meanwhile a parameter was written to or replaced, a
    module was replaced, added or removed, or the rotary embedding was stretched.

    The modules are kept in a list: walking the tree by name takes a millisecond for a model of 12 layers, which a
    prompt would pay twice.
    """

    def __init__(self, model):
        self._model, self._n_changes = model, 0
        self._list_modules()
        self._note()

    def __call__(self) -> int:
        if any(list(now.values()) != before for now, before in self._children):
            self._list_modules()
        if self._has_changed():
            self._n_changes += 1
            self._note()
        return self._n_changes

    def _list_modules(self) -> None:
        modules = list(self._model.modules())
        # Those without children or parameters too, which may get some.
        self._children = [(module._modules, list(module._modules.values())) for module in modules]
        self._owned = [module._parameters for module in modules]

    def _parameters(self) -> list:
        return [x for own in self._owned for x in own.values() if x is not None]

    def _note(self) -> None:
        # By weak references: another parameter may get the address of one that is gone.
        self._seen = [(weakref.ref(x), x.data_ptr(), x._version) for x in self._parameters()]
        self._yarn = self._model.yarn

    def _has_changed(self) -> bool:
        parameters = self._parameters()
        return (
            self._model.yarn != self._yarn
            or len(parameters) != len(self._seen)
            or any(
                ref() is not x or x.data_ptr() != address or x._version != version
                for x, (ref, address, version) in zip(parameters, self._seen, strict=True)
            )
        )
