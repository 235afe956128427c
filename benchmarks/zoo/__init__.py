"""K-FAC on tiny random models of transformers' architectures, against references of its own."""
