"""Data: from text on disk to batches of packed rows, each a pure function of (recipe, integer position)."""
