"""Mathematics: tensors in, tensors out. Knows no process group, no module and no backend."""
