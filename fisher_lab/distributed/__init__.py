"""Several ranks: moving tensors with ``torch.distributed``, and starting the processes."""
