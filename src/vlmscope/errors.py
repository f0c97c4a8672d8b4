"""The error tree.

Every error that a person can cause derives from `VlmscopeError` and carries one line that says
what was wrong, where, what was expected and the way out. The command line prints that line and
exits with status 1; a traceback means a bug.

    VlmscopeError
    ├── SiteError      a site expression that cannot be parsed, or names nothing in this model
    ├── ModelError     a model that cannot be loaded, or does not fit its family's table
    ├── DataError      a data set or table that cannot be read
    │   └── ExampleError   one example that cannot be run (the others can)
    └── StoreError     a result folder that cannot be read, written or continued
"""


class VlmscopeError(Exception):
    """Base of all errors that vlmscope raises on purpose."""


class SiteError(VlmscopeError):
    """A site expression that cannot be parsed, or that names nothing in this model."""


class ModelError(VlmscopeError):
    """A model that cannot be loaded, or that does not fit its family's table."""


class DataError(VlmscopeError):
    """A data set or table that cannot be read."""


class ExampleError(DataError):
    """One example that cannot be run; a study records it as excluded and goes on."""


class StoreError(VlmscopeError):
    """A result folder that cannot be read, written or continued."""
