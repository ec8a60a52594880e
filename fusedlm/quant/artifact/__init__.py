"""The packed artifact: a language model in one file, as small as its codes allow, and read without executing it."""

from fusedlm.quant.artifact.container import Container, DamagedArtifact, is_artifact
from fusedlm.quant.artifact.read import Artifact, read_artifact
from fusedlm.quant.artifact.write import Packed, pack

__all__ = ["Artifact", "Container", "DamagedArtifact", "Packed", "is_artifact", "pack", "read_artifact"]
