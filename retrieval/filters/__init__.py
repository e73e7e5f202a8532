"""Which rows are asked for: conditions (:mod:`.conditions`), and the two forms in which users write them."""

from retrieval.filters.conditions import (
    EVERY_ROW,
    NO_ROW,
    And,
    Attribute,
    AttributeIn,
    Compare,
    Condition,
    ContainsAny,
    In,
    Not,
    Or,
    expression,
    live,
    readable,
    readers,
    rights,
)
from retrieval.filters.openai import openai_filter
from retrieval.filters.where import parse_where

__all__ = [
    "EVERY_ROW",
    "NO_ROW",
    "And",
    "Attribute",
    "AttributeIn",
    "Compare",
    "Condition",
    "ContainsAny",
    "In",
    "Not",
    "Or",
    "expression",
    "live",
    "openai_filter",
    "parse_where",
    "readable",
    "readers",
    "rights",
]
