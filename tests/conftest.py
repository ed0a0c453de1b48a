"""What every test shares."""

from hypothesis import settings

# The same examples on every run; the first call of a torch op is slow, and that is no failure.
settings.register_profile("memdlm", deadline=None, derandomize=True)
settings.load_profile("memdlm")
