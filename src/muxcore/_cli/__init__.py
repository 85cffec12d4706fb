"""What may live here: the command line: arguments, and which command they mean."""


def main(argv: list[str] | None = None) -> int:
    return 2
