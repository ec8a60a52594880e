"""Configuration of the feed-forwards."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusedlm.config.schema import Config, Fraction, NonNegativeFloat, PositiveInt


class SwiGLUConfig(Config):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    type: Literal["swiglu"] = "swiglu"
    hidden: PositiveInt | None = None  # None: 8/3 of dim, rounded up to a multiple of 64


class ReLU2Config(Config):
    """down(leaky_relu(up(x), slope)^2) (arXiv 2109.08668; slope 0 is the published form)."""

    type: Literal["relu2"] = "relu2"
    hidden: PositiveInt | None = None  # None: 4 * dim
    slope: Fraction = 0.0


class RoutedConfig(Config):
    """Three levels of compute, chosen token by token by the entropy of a small router: a light feed-forward alone, a
    blend of light and full, the full one alone. The light one is the first hidden units of the full one."""

    type: Literal["routed"] = "routed"
    hidden: int | None = Field(None, ge=2)  # of the full SwiGLU; None: 8/3 of dim, rounded up to a multiple of 64
    light: float = Field(0.2, gt=0, lt=1)  # hidden width of the light one as a share of the full one's, to 8 units
    low: Fraction = 0.3  # difficulty below which a token takes the light one alone
    high: Fraction = 0.7  # difficulty above which it takes the full one alone
    n_classes: int = Field(8, ge=2)  # of the router's softmax, whose normalised entropy is the difficulty
    budget: float = Field(0.6, gt=0, le=1)  # mean compute a token that training aims at, as a share of the full one's
    budget_weight: NonNegativeFloat = 1.0  # of (compute - budget)^2 in the loss

    @model_validator(mode="after")
    def _check(self):
        if self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}")
        if self.budget < self.light:
            raise ValueError(f"budget={self.budget} is below light={self.light}, which every token costs at least")
        return self


FFNConfig = Annotated[SwiGLUConfig | ReLU2Config | RoutedConfig, Field(discriminator="type")]
