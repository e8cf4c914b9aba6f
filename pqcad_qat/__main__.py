"""`python -m pqcad_qat`: the command line."""

from pqcad_qat.cli import main

if __name__ == "__main__":  # and not in the processes of a sweep, which import it
    main()
