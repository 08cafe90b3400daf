from models import threads  # noqa: F401 - before any module imports torch
