"""Linear attention with a scalar decay, chunked and recurrent."""
