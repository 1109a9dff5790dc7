"""The one kind of error that is meant for the person at the keyboard, and what others are called."""


def why(error: Exception) -> str:
    """Why a file could not be read, without its path, which the sentence around it names."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def out_of_memory(error: BaseException) -> bool:
    """Is it torch.OutOfMemoryError, a CPU allocation that failed, or Python's own?"""
    name, words = type(error).__name__, str(error)
    return name in ("OutOfMemoryError", "MemoryError") or "not enough memory" in words or "out of memory" in words


class UserError(ValueError):
    """Something a person can put right: a bad image, prompt, setting, flag or artifact.

    The message is a whole sentence that says what is wrong and what to do. The page, the command line and the
    library show it as it is; every other exception is a bug.
    """


def about_file(error: OSError) -> str:
    """What the system refused to do with a file or the disk, and what to look at, as one line for people."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}. Check the path, its permissions and the free space."
