"""The one kind of error that is meant for the person at the keyboard."""


def why(error: Exception) -> str:
    """Why a file could not be read, without its path, which the sentence around it names."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class UserError(ValueError):
    """Something a person can put right: a bad image, prompt, setting, flag or artifact.

    The message is a whole sentence that says what is wrong and what to do. The page, the command line and the
    library show it as it is; every other exception is a bug.
    """
