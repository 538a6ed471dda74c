"""The ZAYA1 transformer, pure: it runs on one device and knows nothing of the others."""
