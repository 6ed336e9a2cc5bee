"""Subclasses that are made at run time, and that pickle makes again where it loads.

Pickle keeps a class as its name, by which a class that has the name of its base is not
found. Classes of a metaclass of their own may be kept in another way.
"""

import copyreg
import functools
from collections.abc import Callable, Mapping
from typing import Any

_RECIPE = "_made_by"  # the function and its arguments, in the class that it made


def subclass(
    make: Callable[..., type],
    base: Any,
    about: Any,
    members: Mapping[str, Any],
    **keywords: Any,
) -> Any:
    """Makes a subclass of a class, with its name.

    Args:
      make: Function of ``base`` and ``about``, of a module, that makes the subclass by
        this one. Pickle calls it, and should get the same class each time.
      base: The class.
      about: What else the subclass is made of; it can be pickled.
      members: Its attributes.
      **keywords: Keywords of the class.

    Returns:
      The subclass. It can be pickled if ``base`` can.
    """
    named = {name: getattr(base, name) for name in ("__module__", "__doc__")}
    recipe = {_RECIPE: (make, (base, about))}
    metaclass = _metaclass(type(base))
    attributes = {**named, **members, **recipe}
    return metaclass(base.__name__, (base,), attributes, **keywords)


@functools.cache
def _metaclass(base: Any) -> Any:
    """The metaclass by which pickle knows classes of `subclass`."""
    if copyreg.dispatch_table.get(base) is _reduce:
        return base
    made = type(base.__name__, (base,), {"__module__": base.__module__})
    copyreg.pickle(made, _reduce)
    return made


def _reduce(cls: Any) -> Any:
    # A class that someone has derived from it has a name of its own.
    return vars(cls).get(_RECIPE, cls.__qualname__)
