import models.threads  # noqa: F401 - before any module imports torch
