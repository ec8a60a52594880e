"""Runs where fusedlm and Triton cannot be imported: what Transformers makes of folders with code. Prints JSON."""

import importlib.util
import json
import os
import sys
from pathlib import Path


class _Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fusedlm", "triton"):
            raise ImportError(f"{name} is not installed here")


sys.meta_path.insert(0, _Blocker())
import torch  # noqa: E402
import transformers  # noqa: E402

transformers.logging.set_verbosity_error()
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def check(folder: Path) -> dict[str, float]:
    """Relative errors and differences, all of which must be nearly 0."""
    known = torch.load(folder / "known.pt")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, trust_remote_code=True, dtype=torch.float64).eval()
    assert type(model).__name__ == "FusedLMForCausalLM" and model.dtype == torch.float64
    found = {}
    for tokens, logits in known["logits"]:
        found[f"{tokens.shape[1]} tokens"] = error(model(tokens, use_cache=False).logits, logits)
    tokens, logits = known["logits"][-1]

    name = "cache" if "cache" in model(tokens[:, :1]) else "past_key_values"
    for given in ("cache", "past_key_values"):
        first = model(tokens[:, :20])
        parts, state = [first.logits], first[name]
        for at in ((20, 21), (21, 40), (40, tokens.shape[1])):
            out = model(tokens[:, slice(*at)], **{given: state})
            parts.append(out.logits)
        found[f"chunks, {given}"] = error(torch.cat(parts, 1), logits)
        assert state.get_seq_length() == tokens.shape[1] and not state.is_compileable
    assert state.get_max_length() is None
    found["last logits"] = error(model(tokens, logits_to_keep=3).logits, logits[:, -3:])
    found["chosen logits"] = error(model(tokens, logits_to_keep=torch.tensor([2, 5])).logits, logits[:, [2, 5]])

    prompts, greedy = known["prompts"], known["greedy"]
    for use_cache in (True, False):
        for prompt, expected in zip(prompts, greedy, strict=True):
            out = model.generate(prompt[None], max_new_tokens=len(expected), use_cache=use_cache, **GREEDY)
            found[f"greedy, cache {use_cache}"] = differing(out[0, len(prompt) :], expected)
    longest = max(map(len, prompts))
    for side in ("left", "right", "both"):
        ids, mask = zip(*(padded(prompt, longest + 2, side) for prompt in prompts), strict=True)
        ids, mask = torch.stack(ids), torch.stack(mask)
        for use_cache in (True, False):
            out = model(ids, attention_mask=mask, use_cache=use_cache).logits
            for row, prompt in enumerate(prompts):
                alone = model(prompt[None], use_cache=False).logits[0]
                found[f"padding {side} {row} {use_cache}"] = error(out[row][mask[row].bool()], alone)
        if side == "left":
            out = model.generate(ids, attention_mask=mask, max_new_tokens=len(greedy[0]), **GREEDY)
            found["greedy batch"] = differing(out[:, ids.shape[1] :], torch.stack(greedy))
            beams = {"num_beams": 3, "max_new_tokens": 8, "attention_mask": mask, **GREEDY}
            with_cache, without = (model.generate(ids, use_cache=use, **beams) for use in (True, False))
            found["beams"] = differing(with_cache, without)

    model.save_pretrained(folder / "again")
    assert (folder / "again" / "modeling_fusedlm.py").is_file()
    again = load(folder / "again", trust_remote_code=True, dtype=torch.float64).eval()
    found["saved and loaded"] = error(again(tokens).logits, model(tokens).logits)

    found["imported directly"] = error(imported(folder)(tokens).logits, model(tokens).logits)

    half = load(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
    kept = {n for n, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == set(known["unrounded"]), kept ^ set(known["unrounded"])
    found["bfloat16"] = error(half(tokens).logits, logits) / 1e8

    labels = tokens.clone()
    labels[:, :3] = -100
    loss = model.train()(tokens, labels=labels).loss
    expected = torch.nn.functional.cross_entropy(logits[:, 2:-1].flatten(0, 1), tokens[:, 3:].flatten())
    found["loss"] = error(loss.double(), expected.double()) / 1e3  # Transformers computes it in float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    return found


def imported(folder: Path):
    """The model of the file as a module, without Auto classes; what it saves loads with them."""
    spec = importlib.util.spec_from_file_location("modeling_fusedlm", folder / "modeling_fusedlm.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.FusedLMConfig.from_pretrained(folder)
    del config.auto_map  # which saving writes again
    model = module.FusedLMForCausalLM.from_pretrained(folder, config=config, dtype=torch.float64).eval()
    model.save_pretrained(folder / "direct")
    config = json.loads((folder / "direct" / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModelForCausalLM"}
    assert (folder / "direct" / "modeling_fusedlm.py").is_file()
    return model


def error(found, expected) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return ((found.double() - expected).norm() / expected.norm()).item()


def differing(found, expected) -> int:
    return int((found != expected).sum()) if found.shape == expected.shape else -1


def padded(prompt, length, side):
    n = length - len(prompt)
    before = {"left": n, "right": 0, "both": n // 2}[side]
    ids = torch.nn.functional.pad(prompt, (before, n - before), value=1)
    mask = torch.zeros(length, dtype=torch.int64)
    mask[before : before + len(prompt)] = 1
    return ids, mask


def refusals(folder: Path) -> list[str]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = torch.ones(1, 3, dtype=torch.int64)
    said = []
    for wrong in (
        {"inputs_embeds": torch.zeros(1, 3, 4)},
        {"input_ids": tokens, "attention_mask": torch.ones(1, 2)},
        {"input_ids": tokens, "position_ids": torch.tensor([[0, 0, 1]])},
    ):
        try:
            model(**wrong)
        except ValueError as problem:
            said.append(str(problem))
    return said


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folders = sorted(Path(sys.argv[1]).iterdir())
    with torch.set_grad_enabled(True):
        result = {folder.name: check(folder) for folder in folders}
    ours = sorted(name for name in sys.modules if name.split(".")[0] in ("fusedlm", "triton"))
    print(json.dumps({"found": result, "modules": ours, "refused": refusals(folders[0])}))
    sys.stdout.flush()
    os._exit(0)
