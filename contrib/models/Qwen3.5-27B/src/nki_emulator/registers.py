# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Virtual registers: the only runtime values that may steer control flow or indexing."""

from __future__ import annotations

import inspect
from typing import Any

from .errors import fail


class NKIObject:
    """Base class of the classes that a kernel may use.

    As the compiler does, a subclass without an ``__init__`` gets one that takes its fields, decorated as a dataclass or
    not; a field without a value is None (nki/get-started/nki-language-guide.rst, Class Support).
    """

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not any("__init__" in kind.__dict__ for kind in cls.__mro__ if kind not in (object, NKIObject)):
            # In the class itself, so that a dataclass decorator does not replace it.
            cls.__init__ = NKIObject.__init__  # type: ignore[method-assign]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        fields = _fields(type(self))
        if len(args) > len(fields) or not set(kwargs) <= set(fields):
            raise TypeError(f"{type(self).__name__} has fields {list(fields)}, got {args} and {sorted(kwargs)}")
        fields.update(zip(fields, args, strict=False))
        fields.update(kwargs)
        for name, value in fields.items():
            object.__setattr__(self, name, value)  # a frozen dataclass allows no other way
        post_init = getattr(self, "__post_init__", None)
        if post_init is not None:
            post_init()


def _fields(kind: type) -> dict[str, Any]:
    """Fields of an NKI class with their defaults: annotated names, and plain class attributes."""
    fields: dict[str, Any] = {}
    dataclass_fields = kind.__dict__.get("__dataclass_fields__", {})
    for base in reversed(kind.__mro__):
        if base in (object, NKIObject):
            continue
        names = list(inspect.get_annotations(base))
        names += [
            name
            for name, value in base.__dict__.items()
            if not name.startswith("_") and name not in names and not callable(value) and not hasattr(value, "__get__")
        ]
        for name in names:
            fields[name] = getattr(kind, name, None)
            factory = getattr(dataclass_fields.get(name), "default_factory", None)
            if callable(factory):
                fields[name] = factory()
    return fields


class VirtualRegister(NKIObject):
    """A 32-bit scalar register.

    The emulator executes eagerly, so a register knows its value; arithmetic on it yields another register. It indexes
    tensors, bounds ``nl.dynamic_range`` and is the condition of a dynamic ``while``.
    """

    __slots__ = ("_value",)

    def __init__(self, value: int | None = None) -> None:
        self._value = value

    @property
    def value(self) -> int:
        """Current content.

        Raises:
            NkiValidationError: nothing was loaded into the register.
        """
        if self._value is None:
            fail("register", "it is read before it was loaded", "initialise it first", "nki/api/nki/isa/__init__.py")
        assert self._value is not None
        return self._value

    @value.setter
    def value(self, value: int) -> None:
        self._value = int(value)

    def __index__(self) -> int:
        return self.value

    def __int__(self) -> int:
        return self.value

    def __bool__(self) -> bool:
        return self.value != 0

    def __repr__(self) -> str:
        return f"VirtualRegister({self._value})"

    def __eq__(self, other: object) -> bool:
        return self.value == int(other) if isinstance(other, (int, VirtualRegister)) else NotImplemented

    __hash__ = object.__hash__

    def __add__(self, other: int | VirtualRegister) -> VirtualRegister:
        return VirtualRegister(self.value + int(other))

    def __sub__(self, other: int | VirtualRegister) -> VirtualRegister:
        return VirtualRegister(self.value - int(other))

    def __rsub__(self, other: int | VirtualRegister) -> VirtualRegister:
        return VirtualRegister(int(other) - self.value)

    def __mul__(self, other: int | VirtualRegister) -> VirtualRegister:
        return VirtualRegister(self.value * int(other))

    def __floordiv__(self, other: int | VirtualRegister) -> VirtualRegister:
        return VirtualRegister(self.value // int(other))

    def __mod__(self, other: int | VirtualRegister) -> VirtualRegister:
        return VirtualRegister(self.value % int(other))

    __radd__ = __add__
    __rmul__ = __mul__

    def __lt__(self, other: int | VirtualRegister) -> bool:
        return self.value < int(other)

    def __le__(self, other: int | VirtualRegister) -> bool:
        return self.value <= int(other)

    def __gt__(self, other: int | VirtualRegister) -> bool:
        return self.value > int(other)

    def __ge__(self, other: int | VirtualRegister) -> bool:
        return self.value >= int(other)
