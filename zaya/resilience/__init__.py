"""Faults: why a process of a job ended, who is late or gone, and what happens next."""
