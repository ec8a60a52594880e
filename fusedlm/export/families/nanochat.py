"""NanoChat: attention and squared ReLU, with norms that have no gains, one of the embedding too."""

from dataclasses import dataclass

import torch

from fusedlm.config.model import ModelConfig
from fusedlm.export.families.base import Obstacle, layer_blocks, wiring_obstacles
from fusedlm.export.families.softmax import SoftmaxFamily, attention_shape
from fusedlm.export.weights import Rule, same

_CAP = "final_logit_softcapping"


@dataclass(frozen=True)
class NanoChat(SoftmaxFamily):
    """It rotates by negative angles, which is the other order of both halves of a head, and has the norms of queries
    and keys after the rotation, which does not change their length."""

    def wiring_obstacles(self, model):
        found = wiring_obstacles(model, self.label, ("embedding_norm", "norm_gain", "logit_softcap"))
        if not model.embedding_norm:
            found.append(Obstacle("model.embedding_norm", False, f"{self.label} has it; set true"))
        if model.norm_gain:
            found.append(Obstacle("model.norm_gain", True, f"{self.label} has none; set false"))
        if model.depth_scaled_norms:
            found.append(Obstacle("model.depth_scaled_norms", True, f"{self.label} has no gains to hold it; set false"))
        if model.mup is not None:
            width = model.mup.base_width
            found.append(Obstacle("model.mup.base_width", width, f"{self.label} has no gains to hold it; set mup null"))
        return found

    def config(self, model, embedding_scale):
        keys = super().config(model, embedding_scale)
        del keys["head_dim"], keys["mlp_bias"]
        return keys | {_CAP: model.logit_softcap}

    def model(self, config):
        tree = super().model(config)
        cap = 15.0 if _CAP not in config.tree else config.number(_CAP, None)
        return tree | {"embedding_norm": True, "norm_gain": False, "logit_softcap": cap}

    def rules(self, model: ModelConfig) -> list[Rule]:
        rules = [same("embedding.weight", "model.embed_tokens.weight")]
        if not model.tie_embeddings:
            rules.append(same("head.weight", "lm_head.weight"))
        for layer, (_, block) in enumerate(layer_blocks(model)):
            ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
            shape = attention_shape(model, block)
            qkv, *others = self.attention_rules(f"{ours}.mixer", f"{theirs}.self_attn", shape)
            rules += [_turned(qkv, shape["mixer.head_dim"]), *others]
            for name, their_name in (("up", "fc1"), ("down", "fc2")):
                rules.append(same(f"{ours}.ffn.{name}.weight", f"{theirs}.mlp.{their_name}.weight"))
        return rules


def _turned(qkv: Rule, head_dim: int) -> Rule:
    """With the halves of each head of queries and keys in the other order."""

    def turned(parts) -> list[torch.Tensor]:
        q, k, v = parts
        return [*(x.unflatten(0, (-1, head_dim)).roll(head_dim // 2, 1).flatten(0, 1) for x in (q, k)), v]

    return Rule(qkv.ours, qkv.theirs, lambda weight: turned(qkv.write(weight)), lambda parts: qkv.read(turned(parts)))


NANOCHAT = NanoChat(
    "nanochat",
    "NanoChat",
    "nanochat",
    "NanoChatForCausalLM",
    ffn="relu2",
    qk_norm=True,
    qk_gain="none",
    yarn=False,
    free_head_dim=False,
)
