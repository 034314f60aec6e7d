"""What keeps a run alive: flags, ranks, weights wherever they are, checkpoints, signals, files, progress.

And parts of the method that need not be read with it: attention over many texts, drawing a token, places for an adverb,
an update's figures, tables.
"""
