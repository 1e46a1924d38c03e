"""What every error that is raised on purpose says."""


def check_message(error, where=None, got=None, expected=None, fix=None):
    """Texts that stand in its fields; and it says what was expected, or how to mend it."""
    for name, text in (("where", where), ("got", got), ("expected", expected), ("fix", fix)):
        if text is not None:
            assert text in str(getattr(error, name)), (
                f"{name}: {text!r} not in {getattr(error, name)!r}"
            )
    assert error.expected or error.fix, "says neither what was expected nor how to fix it"
