"""``python -m arsp`` is the ``arsp`` command (and what ``torchrun -m arsp`` starts)."""

from arsp.cli.app import main

if __name__ == "__main__":
    main()
