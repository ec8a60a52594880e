"""The feed-forwards of a recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusedlm.config.schema import Config, Fraction, NonNegativeFloat, Scale

Hidden = Annotated[int, Field(gt=0, le=2**22)]


class NoFFNConfig(Config):
    """None: the block is its mixer alone, x + mixer(norm(x)), as in Mamba 2."""

    type: Literal["none"] = "none"
    """The feed-forward."""


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


ExpertCount = Annotated[int, Field(ge=0, le=2**14)]


class MoEConfig(Config):
    """Mixture of experts (DeepSeek-V3, arXiv 2412.19437): shared experts for every token, and for each token the top_k
    of n_experts routed ones. No token is dropped."""

    type: Literal["moe"] = "moe"
    """The feed-forward."""
    n_experts: ExpertCount
    """Routed experts; 0: none, and the shared ones are widened to (n_shared + top_k) * hidden, the width that a token
    used: a dense feed-forward of the same kind and compute."""
    top_k: int = Field(gt=0, le=2**14)
    """Routed experts that a token uses."""
    hidden: Hidden
    """Hidden width of an expert."""
    n_shared: ExpertCount = 1
    """Shared experts, packed in one dense feed-forward of n_shared * hidden units."""
    activation: Literal["swiglu", "relu2"] = "swiglu"
    """Kind of all experts."""
    slope: Fraction = 0.0
    """Of relu2: slope below zero of the activation before it is squared."""
    n_groups: int = Field(1, gt=0, le=2**14)
    """Groups of consecutive experts, such as those of one device."""
    n_limited_groups: int | None = Field(None, gt=0, le=2**14)
    """Groups that the experts of a token may be in: those with the highest sums of their two best biased scores. null:
    all."""
    routed_scaling: Scale = 1.0
    """Factor of the routed experts' weights, which sum to 1 before it."""
    bias_rate: float = Field(1e-3, ge=0, le=1)
    """Step of the balance bias, which is added to scores for the selection alone: once per optimizer step it grows for
    experts with less than the mean load and shrinks for the others. 0: off."""
    sequence_loss: NonNegativeFloat = 0.0
    """Weight of the balance loss within each sequence; 1e-4 in DeepSeek-V3."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the mean square of the router's log-sum-exp (arXiv 2202.08906)."""

    @model_validator(mode="after")
    def _check(self):
        if self.slope and self.activation != "relu2":
            raise ValueError(f"slope={self.slope} is for activation=relu2, not {self.activation}")
        if self.n_experts == 0:
            return self
        if self.n_experts % self.n_groups:
            raise ValueError(f"n_groups={self.n_groups} does not divide n_experts={self.n_experts}")
        limit = self.n_groups if self.n_limited_groups is None else self.n_limited_groups
        if limit > self.n_groups:
            raise ValueError(f"n_limited_groups={limit} is more than n_groups={self.n_groups}")
        reachable = limit * (self.n_experts // self.n_groups)
        if self.top_k > reachable:
            within = f" in {limit} of {self.n_groups} groups" if limit < self.n_groups else ""
            raise ValueError(f"top_k={self.top_k} is more than the {reachable} experts{within}; lower top_k")
        return self


FFNConfig = Annotated[
    SwiGLUConfig | ReLU2Config | RoutedConfig | MoEConfig | NoFFNConfig, Field(discriminator="type")
]
