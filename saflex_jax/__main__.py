"""`python -m saflex_jax` is the command `saflex`, whose commands are in `experiments`."""


def main() -> None:
    """Runs the command that the arguments name."""
    from experiments import commands  # only here: the package imports nothing of `experiments`

    commands.main()


if __name__ == "__main__":
    main()
