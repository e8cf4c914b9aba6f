"""`python -m pqcad_qat`: the command line."""

from pqcad_qat.cli import main

main()
