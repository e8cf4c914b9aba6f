"""One file for each command, named after it. Each loads what it needs, calls a few named steps in order, and returns a
record.
"""
