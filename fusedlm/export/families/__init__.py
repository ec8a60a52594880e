"""The families: classes of Transformers that a recipe can be, the choice among them, and what stands in the way."""

from fusedlm.config.model import ModelConfig
from fusedlm.export.families.base import Family, Obstacle
from fusedlm.export.families.hybrid import Qwen35
from fusedlm.export.families.latent import DeepseekV3
from fusedlm.export.families.mamba import Bamba, GraniteMoeHybrid
from fusedlm.export.families.nanochat import NANOCHAT
from fusedlm.export.families.single import Mamba2, NemotronH
from fusedlm.export.families.softmax import ARCEE, GRANITE, LLAMA, MISTRAL, PHI3, QWEN3
from fusedlm.model import build_model

# In the order of choice: the more widely known first.
FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    QWEN3,
    GRANITE,
    ARCEE,
    PHI3,
    NANOCHAT,
    DeepseekV3(),
    Qwen35(),
    Bamba(),
    GraniteMoeHybrid(),
    Mamba2(),
    NemotronH(),
)


def family_named(name: str) -> Family:
    """Raises ValueError if there is none of this name."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ValueError(f"--family {name}: must be one of {', '.join(family.name for family in FAMILIES)}")


def fits(model: ModelConfig) -> dict[str, list[Obstacle]]:
    """What stands in the way of each family, by its name, the nearest first; [] where the model fits.

    Of several that fit, one with a factor of the embedding comes first where a tied embedding has one: folded into the
    weights, it would divide the last norm by it. Then the order of `FAMILIES` counts.
    """
    found = {family: family.obstacles(model) for family in FAMILIES}
    scaled = model.tie_embeddings and embedding_scale(model) != 1.0

    def rank(family: Family) -> tuple:
        wrong_types = sum(obstacle.key.endswith(".type") for obstacle in found[family])
        return wrong_types, len(found[family]), scaled and not family.keeps_embedding_scale

    return {family.name: found[family] for family in sorted(FAMILIES, key=rank)}


def choose_family(model: ModelConfig, wanted: str | None = None) -> Family:
    """The family of a recipe.

    Args:
        wanted: its name; None: the first that fits.

    Raises:
        ValueError: the model does not fit; names the keys.
    """
    every = fits(model)
    family = family_named(wanted or next(iter(every)))
    if obstacles := every[family.name]:
        nearest = "" if wanted else "no family fits (--to hf-code writes any recipe); the nearest is "
        raise ValueError(f"{nearest}{family.name}: {'; '.join(map(str, obstacles))}")
    return family


def embedding_scale(model: ModelConfig) -> float:
    """Factor of the embedding."""
    return build_model(model, vocab_size=1, device="meta").embedding_scale
