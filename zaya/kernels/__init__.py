"""One file per op; `reference` is the specification of them all. Imports torch and triton, nothing of zaya."""
