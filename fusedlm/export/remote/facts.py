"""What is known of a model outside of training and of our own serving: by it the code of the package is simplified."""

from dataclasses import dataclass, field

NONE, FALSE, ZERO = None, False, 0

# Variables and parameters, wherever they occur. A parameter of such a name is left out.
NAMES = {
    "boundaries": NONE,
    "documents": NONE,
    "documents_BT": NONE,
    "in_place": FALSE,
    "is_normed": FALSE,
    "max_tokens": NONE,
    "normed": NONE,
    "of_next": NONE,
    "page_table": NONE,
    "page_table_BP": NONE,
    "reset": NONE,
    "reset_BT": NONE,
    "rope_key": NONE,
    "select": NONE,
    "soft_targets": NONE,
    "targets_N": NONE,
    "token_scale": NONE,
    "token_weight": NONE,
    "varying": FALSE,
}
# Attributes of any object.
ATTRIBUTES = {
    "_before": NONE,
    "_mark": NONE,
    "_since": NONE,
    "boundaries": NONE,
    "capacity": NONE,
    "ends_branch": FALSE,
    "fuses": FALSE,
    "in_place": FALSE,
    "max_tokens": NONE,
    "packed": FALSE,
    "recomputes_block": FALSE,
    "recomputes_mixer": FALSE,
    "recomputes_output": FALSE,
    "reset_BT": NONE,
    "slots_B": NONE,
    "spare": ZERO,
    "static": FALSE,
}
# Functions and methods whose result is always false, such as whether a fused kernel runs.
NEVER = {
    "_fuses_norm",
    "_varlen_attention",
    "casts_input",
    "ends_token",
    "fuses_append",
    "fuses_norm",
    "fuses_token",
    "is_compiling",
    "is_one_token",
    "runs_fused",
}
# Classes that no value is an instance of.
NO_INSTANCES = {"PendingActivation", "PendingInput", "PendingMix", "PendingNorm", "PendingProduct", "DTensor"}
# Statements that are a call of these are left out: checks of arguments, which the callers here keep.
CHECKS = {
    "_check",
    "_check_noise",
    "_check_rows",
    "_check_shapes",
    "check_cap",
    "check_ids",
    "check_in_place",
    "check_shapes",
}
# Of a pair that these return or are given the first alone is used: the second is for training.
VOID = {"report", "reports", "normed"}
FIRST_OF_PAIR = {
    ("Block", "_compute"),
    ("Block", "_input"),
    ("Block", "forward"),
    ("Decoder", "_through_blocks"),
    ("MoE", "forward"),
    ("RoutedFFN", "forward"),
}
# Arguments that are functions for a later rollback.
REPLAYS = {"replay"}
# Calls without an effect, of which an unused result can go.
PURE_CALLS = {
    "Constant",
    "Loss",
    "Normal",
    "Role",
    "backend",
    "budget_loss",
    "count_tokens",
    "flatten",
    "hasattr",
    "is_grad_enabled",
    "isinstance",
    "items",
    "len",
    "log",
    "long",
    "promote_types",
    "sizes",
    "sqrt",
    "tuple",
    "zeros",
}
KEYWORDS = {"backend"}
# Methods of which others have the same name.
LEFT_OUT = {
    ("SquaredReLU", "mlp"),
    ("SquaredReLU", "of_token"),
    ("SquaredReLU", "sizes"),
    ("SwiGLUActivation", "mlp"),
    ("SwiGLUActivation", "of_token"),
    ("SwiGLUActivation", "sizes"),
    ("PendingMix", "norm"),
    ("Decoder", "_apply"),
    ("LMHead", "_loss"),
    ("LMHead", "_soft_loss"),
    ("RecurrentState", "_copy"),
    ("State", "next_of"),
    ("State", "rope"),
}
# Attributes that torch itself reads, or that other programs may.
READ_ELSEWHERE = {
    "in_features",
    "out_features",
    "num_embeddings",
    "embedding_dim",
    "padding_idx",
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "sparse",
    "bias",
}


@dataclass
class Facts:
    """What holds for one recipe.

    own: constant attributes by class, of its own instances. everywhere: those of all objects that have them.
    parameters: by (module, function or class.method) the parameters to leave out, and the expression that each always
        is; None: nothing reads it.
    tables: the keys that are used of constant dictionaries.
    unread: attributes that nothing reads.
    names: variables and parameters that are constant, wherever they occur.
    """

    own: dict[str, dict[str, object]] = field(default_factory=dict)
    everywhere: dict[str, object] = field(default_factory=dict)
    parameters: dict[tuple[str, str], dict[str, object]] = field(default_factory=dict)
    tables: dict[str, set[str]] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    names: dict[str, object] = field(default_factory=lambda: dict(NAMES))


class NotNone:
    """An attribute that is never None, and whatever else."""


NOT_NONE = NotNone()
