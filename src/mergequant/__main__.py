"""`python -m mergequant` is the command `mergequant`."""

from mergequant.cli import main

if __name__ == "__main__":
    main(prog_name="mergequant")
