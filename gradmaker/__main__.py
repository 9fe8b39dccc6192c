"""`python -m gradmaker`."""

from gradmaker.cli import main

if __name__ == "__main__":
    main()
