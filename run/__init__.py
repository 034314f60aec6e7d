"""What keeps a run alive: flags, ranks, weights wherever they are, checkpoints, signals, files, progress."""
