# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a kernel hears when it breaks a rule of the hardware or of the language, or relies on what nothing promises."""

from typing import NoReturn


class NkiValidationError(Exception):
    """A constraint of the hardware or of NKI is violated.

    The message reads ``<call>: <operand> <value>: <rule> (<page that states the rule>)``.
    """


class NkiWarning(UserWarning):
    """A kernel runs here and relies on something that the documentation does not promise; worded as the error."""


def fail(call: str, what: str, rule: str, source: str) -> NoReturn:
    """Raise :class:`NkiValidationError` in the common form.

    Args:
        call: the API function, e.g. ``nc_matmul``.
        what: the operand and the value found, e.g. ``moving has 513 columns``.
        rule: what is allowed.
        source: the documentation page of the rule, relative to the SDK repository, or ``inferred``.
    """
    raise NkiValidationError(f"{call}: {what}; {rule} ({source})")
