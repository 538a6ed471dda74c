"""Checkpoints: a directory of safetensors files and a manifest that says which box of which logical tensor lies where."""
