"""One file a command, named as the command: each loads what it needs, calls a few named steps in order, and returns a
record.
"""
