"""Train: DeepSpeed towers and a class-sharded softmax under Ray Train; checkpoints know class ranges, not ranks."""
