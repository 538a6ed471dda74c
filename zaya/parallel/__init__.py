"""Who owns what among the ranks, and what they send each other. The model never imports this, nor this the model."""
