"""`python -m inflate`, and `accelerate launch -m inflate` in several processes: the command `inflate`."""

from inflate.cli import main

if __name__ == "__main__":
    main()
