"""NCCL's share of a GPU."""

from fusedlm.distributed.nccl import limit_blocks, n_blocks


def test_the_limit_of_the_environment_stays(monkeypatch):
    monkeypatch.delenv("NCCL_MAX_CTAS", raising=False)
    default = n_blocks()
    limit_blocks()
    assert n_blocks() == default > 0
    monkeypatch.setenv("NCCL_MAX_CTAS", "3")
    limit_blocks()
    assert n_blocks() == 3
