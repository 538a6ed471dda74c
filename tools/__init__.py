"""Command line tools: `python -m tools.NAME --help`. They import zaya; nothing imports them."""
