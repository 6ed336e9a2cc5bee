"""`python -m qjax` is `qjax`."""

from qjax.cli import main

if __name__ == "__main__":
    main()
