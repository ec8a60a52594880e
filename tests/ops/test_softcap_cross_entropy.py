import pytest
import torch

from fusedlm.ops import softcap_cross_entropy


@pytest.mark.parametrize("cap", [None, 3.0, 30.0])
@pytest.mark.parametrize("classes, padded", [(2, 2), (13, 16), (64, 64)])
def test_is_the_log_softmax_of_capped_logits(cap, classes, padded):
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(11, padded, generator=g, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, classes, (11,), generator=g)
    targets[3] = -100
    nll = softcap_cross_entropy(logits, targets, cap=cap, n_classes=classes)
    for row, target in enumerate(targets.tolist()):
        z = logits[row, :classes].detach()
        z = z if cap is None else cap * torch.tanh(z / cap)
        expected = 0.0 if target < 0 else (z.exp().sum().log() - z[target]).item()
        assert nll[row].item() == pytest.approx(expected, abs=1e-12)
    (gradient,) = torch.autograd.grad(nll.sum(), logits)
    assert gradient[3].abs().max() == 0 and not gradient[:, classes:].any()
    assert torch.autograd.gradcheck(lambda z: softcap_cross_entropy(z, targets, cap=cap, n_classes=classes), logits)


def test_bfloat16_logits_are_summed_in_float32():
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(5)
    nll = softcap_cross_entropy(logits, targets, cap=15.0)
    assert nll.dtype == torch.float32
    expected = softcap_cross_entropy(logits.double(), targets, cap=15.0)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=0)
