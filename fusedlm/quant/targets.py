"""The weights of a model that can be quantised, in the order in which a token meets them."""

from dataclasses import dataclass

import torch

from fusedlm.nn.embedding import Embedding
from fusedlm.nn.ffn.experts import Experts
from fusedlm.nn.linear import Linear
from fusedlm.nn.lm_head import LMHead
from fusedlm.nn.module import roles

KINDS = ("matrix", "embedding", "head")  # roles


@dataclass(frozen=True)
class Target:
    """A parameter that is a matrix (N, K), or a stack of matrices whose rows are concatenated.

    name: of the parameter. module, attribute: where it is. kind: matrix, embedding or head.
    stack: matrices in it. tied: an embedding that is the head too, to whose inputs it is quantised.
    """

    name: str
    module: torch.nn.Module
    attribute: str
    kind: str
    stack: int = 1
    tied: bool = False

    @property
    def parameter(self) -> torch.nn.Parameter:
        return getattr(self.module, self.attribute)

    @property
    def is_expert(self) -> bool:
        """Whether it is a stack of routed experts."""
        return type(self.module) is Experts

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), of all matrices of a stack together."""
        width = self.parameter.shape[-1]
        return self.parameter.numel() // width, width

    @torch.no_grad()
    def write(self, values_NK: torch.Tensor) -> None:
        """Make these the values of the parameter."""
        self.parameter.copy_(values_NK.view_as(self.parameter))


@dataclass(frozen=True)
class Stage:
    """Weights that are quantised with the same run of the calibration text: all before them are quantised by then.

    last: the module after which the rest of the model need not run; None: nothing of these runs in a forward pass.
    """

    name: str
    targets: tuple[Target, ...]
    last: torch.nn.Module | None


def stages(model: torch.nn.Module) -> list[Stage]:
    """Embeddings and what is beside them, each block, the head, modules of multi-token prediction. Routers, norms,
    convolutions and vectors are not among them.

    A tied table is in the first stage: its inputs as a head are those of the model before anything is quantised.
    """
    found = _targets(model)

    def below(module: torch.nn.Module | None) -> tuple[Target, ...]:
        inside = set() if module is None else set(module.modules())
        return tuple(target for target in found if target.module in inside)

    beside = [part for part in (model.embedding, model.bigram, model.value_table) if part is not None]
    first = tuple(target for part in beside for target in below(part))
    result = [Stage("embeddings", first, model.head.norm if model.tied else model.blocks[0].mixer_norm)]
    result += [Stage(f"block {i}", below(block), block) for i, block in enumerate(model.blocks)]
    result += [Stage("head", below(model.head), model.head.norm), Stage("mtp", below(model.mtp), None)]
    assert sum(len(stage.targets) for stage in result) == len(found)
    return [stage for stage in result if stage.targets]


def _targets(model: torch.nn.Module) -> list[Target]:
    kinds, found = roles(model), []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for attribute, _ in module.__dict__.get("_declared", {}).items():
            parameter = getattr(module, attribute)
            name = names[id(parameter)]
            if type(module) not in (Linear, Experts, Embedding, LMHead) or kinds[name].kind not in KINDS:
                continue
            stack = parameter.shape[0] if parameter.dim() == 3 else 1
            tied = parameter is model.head.weight and module is not model.head
            found.append(Target(name, module, attribute, kinds[name].kind, stack, tied))
    return found


def named(model: torch.nn.Module) -> dict[str, Target]:
    """All targets by name."""
    return {target.name: target for stage in stages(model) for target in stage.targets}
