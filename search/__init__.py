"""Which plan to try next: budgets, projection onto them, scoring of candidates, the search loop."""

import lazy_loader

# Parts are imported when they are asked for; `__init__.pyi` lists them.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
