"""Entry point of `python -m pqcad_qat`: it runs the command line (cli.py)."""

from pqcad_qat.cli import main

if __name__ == "__main__":  # and not in the processes of a sweep, which import it
    main()
