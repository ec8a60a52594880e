"""Signal minus weighted noise, head norm and scale of differential attention."""
