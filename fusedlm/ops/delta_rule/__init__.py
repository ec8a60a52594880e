"""The gated delta rule, chunked and recurrent."""
