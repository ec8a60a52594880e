"""Ids that are in the padding of the embedding, or in no row of it, are an error and never a number."""

import pytest
import torch

from fusedlm.testing.models import part_model

VOCAB = 61  # padded to 64 rows


@pytest.fixture(scope="module")
def model():
    return part_model("{type: attention, n_heads: 2}", vocab_size=VOCAB, extra="vocab_multiple: 64")


@pytest.mark.parametrize("bad", [VOCAB, 63, 64, -1, 2**40])
def test_tokens_and_targets_outside_of_the_vocabulary_are_refused(model, bad):
    tokens = torch.tensor([[0, VOCAB - 1, 5]])
    changed = torch.tensor([[0, bad, 5]])
    message = f"id {bad} is not in the model's vocabulary of {VOCAB}; use the tokenizer"
    for call in (
        lambda: model(changed),
        lambda: model(changed, state=model.init_state(1)),
        lambda: model(tokens, targets=changed),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    with torch.no_grad(), pytest.raises(ValueError, match=f"targets: {message}"):
        model(tokens, targets=changed)


def test_targets_that_are_ignored_are_no_ids(model):
    tokens = torch.tensor([[0, VOCAB - 1, 5]])
    output = model(tokens, targets=torch.tensor([[-100, VOCAB - 1, -100]]))
    assert torch.isfinite(output.total()) and (output.nll != 0).sum() == 1
    with pytest.raises(ValueError, match="targets: id -99"):
        model(tokens, targets=torch.tensor([[-100, -99, 0]]))


def test_compiled_parts_are_not_checked(model):
    """A check reads values, which would break a full graph."""
    compiled = torch.compile(model.embedding, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.tensor([[1, 2]])), model.embedding(torch.tensor([[1, 2]])))
