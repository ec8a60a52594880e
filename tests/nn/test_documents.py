import torch

from fusedlm.nn.context import document_positions, row_boundaries
from fusedlm.ops.attention.sdpa import varlen_boundaries


def test_positions_restart_where_the_number_changes():
    documents = torch.tensor([[4, 4, 4, 9, 9, 4], [0, 1, 2, 2, 2, 2]])
    assert document_positions(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]


def test_positions_continue_after_earlier_tokens():
    documents = torch.tensor([[4, 4, 9], [3, 3, 3]])
    positions = document_positions(documents, torch.tensor([4, 2]), torch.tensor([10, 5]))
    assert positions.tolist() == [[10, 11, 0], [0, 1, 2]]


def test_boundaries_cover_all_rows():
    positions = document_positions(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 2]]))
    cumulative, longest = varlen_boundaries(positions)
    assert cumulative.dtype == torch.int32 and cumulative.shape == (64,) and longest == 4
    assert cumulative[:5].tolist() == [0, 2, 4, 7, 8] and (cumulative[4:] == 8).all()


def test_boundaries_of_rows_without_documents():
    cumulative, longest = row_boundaries(3, 5, torch.device("cpu"))
    assert cumulative.tolist() == [0, 5, 10, 15] and cumulative.dtype == torch.int32 and longest == 5
