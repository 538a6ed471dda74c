"""What some tests need of the machine they run on."""

import pytest

from zaya.kernels import cpu

needs_compiler = pytest.mark.skipif(cpu.compiler() is None, reason="ops in C need a C compiler")
