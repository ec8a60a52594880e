"""The feed-forwards of a recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusedlm.config.schema import Config, Fraction, NonNegativeFloat

Hidden = Annotated[int, Field(gt=0, le=2**22)]


class SwiGLUConfig(Config):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    type: Literal["swiglu"] = "swiglu"
    """The feed-forward."""
    hidden: Hidden | None = None
    """Hidden width; null: 8/3 of dim, rounded up to a multiple of 64."""


class ReLU2Config(Config):
    """down(leaky_relu(up(x), slope)^2) (arXiv 2109.08668; slope 0 is the published form)."""

    type: Literal["relu2"] = "relu2"
    """The feed-forward."""
    hidden: Hidden | None = None
    """Hidden width; null: 4 * dim."""
    slope: Fraction = 0.0
    """Slope below zero of the activation before it is squared."""


class RoutedConfig(Config):
    """A feed-forward with three levels of compute per token, chosen by the entropy of a small router: light, a blend of
    light and full, full. The light feed-forward is the first hidden units of the full one."""

    type: Literal["routed"] = "routed"
    """The feed-forward."""
    hidden: int | None = Field(None, ge=2, le=2**22)
    """Hidden width of the full SwiGLU; null: 8/3 of dim, rounded up to a multiple of 64."""
    light: float = Field(0.2, gt=0, lt=1)
    """Hidden width of light as a fraction of full, rounded to multiples of 8."""
    low: Fraction = 0.3
    """Entropy of the router, from 0 to 1, below which a token takes light alone."""
    high: Fraction = 0.7
    """Entropy of the router above which a token takes full alone."""
    n_classes: int = Field(8, ge=2, le=2**14)
    """Classes of the router's softmax."""
    budget: float = Field(0.6, gt=0, le=1)
    """Target of the mean compute per token, as a fraction of full."""
    budget_weight: NonNegativeFloat = 1.0
    """Weight of (compute - budget)^2 in the loss."""

    @model_validator(mode="after")
    def _check(self):
        if self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}")
        if self.budget < self.light:
            raise ValueError(f"budget={self.budget} is below light={self.light}, the least compute per token")
        return self


FFNConfig = Annotated[SwiGLUConfig | ReLU2Config | RoutedConfig, Field(discriminator="type")]
