"""Secrets and personal data in a text: where they stand (:func:`find`), never shown in full (:func:`mask`).

Secrets are what the patterns of detect-secrets' precise plugins match, and a few formats that it misses or matches only
the beginning of; its guesses by entropy or by a neighbouring word such as "password" are left out, since prose is full of them. Telephone
numbers are those that phonenumbers (libphonenumber) holds for valid. Cards and IBANs must pass their check digits,
and an IP address must be a public one. Nothing is looked up on the network.

Not covered: names, addresses, dates of birth, national numbers of identity.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import phonenumbers
from phonenumbers import Leniency, PhoneNumberMatcher

SECRET_PLUGINS = {
    "aws": "AWSKeyDetector",
    "azure_storage_key": "AzureStorageKeyDetector",
    "basic_auth": "BasicAuthDetector",
    "discord": "DiscordBotTokenDetector",
    "github_token": "GitHubTokenDetector",
    "gitlab_token": "GitLabTokenDetector",
    "mailchimp": "MailchimpDetector",
    "npm": "NpmDetector",
    "openai": "OpenAIDetector",
    "pypi_token": "PypiTokenDetector",
    "sendgrid": "SendGridDetector",
    "slack": "SlackDetector",
    "square_oauth": "SquareOAuthDetector",
    "stripe": "StripeDetector",
    "telegram_token": "TelegramBotTokenDetector",
    "twilio": "TwilioKeyDetector",
}
"""Module and class of the plugins of detect-secrets that are precise on prose."""
MORE_SECRETS = {
    "GitHub fine-grained token": r"\bgithub_pat_\w{82}\b",
    "Hugging Face token": r"\bhf_[A-Za-z]{34}\b",
    "Google API key": r"\bAIza[0-9A-Za-z_-]{35}(?![\w-])",
    "API key": r"\bsk-(?:proj|ant|svcacct)-[\w-]{32,}",
    "JSON Web Token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*",
    "Private Key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----(?:(?s:.{0,20000}?)-----END [A-Z ]+-----|(?:\s+[A-Za-z0-9+/=]{16,})*)",
}
PLACEHOLDERS = {
    "email address": "<EMAIL>",
    "telephone number": "<PHONE>",
    "card number": "<CARD>",
    "IBAN": "<IBAN>",
    "IP address": "<IP>",
}
"""What stands for a piece of personal data once it is scrubbed; ``<SECRET>`` for the rest."""
REGIONS = {
    "en": ("US", "GB"), "vi": ("VN",), "de": ("DE", "AT", "CH"), "fr": ("FR", "BE", "CH"), "es": ("ES", "MX"),
    "it": ("IT",), "pt": ("BR", "PT"), "nl": ("NL", "BE"), "pl": ("PL",), "cs": ("CZ",), "sv": ("SE",), "da": ("DK",),
    "no": ("NO",), "nb": ("NO",), "fi": ("FI",), "hi": ("IN",), "id": ("ID",), "ja": ("JP",), "ko": ("KR",), "tr": ("TR",),
}  # fmt: skip
"""Language -> countries whose national way of writing telephone numbers is looked for; elsewhere ``+`` is needed."""

EMAIL = re.compile(r"[\w.+%-]{1,64}+@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}\b")
DIGITS = re.compile(r"\d(?:[^\w\n]{0,3}\d){6}")
"""Seven digits with little between them: the least that is worth a look for numbers."""
CARD = re.compile(
    r"(?<![\w.,-])(?:4|5[1-5]|2[2-7]|3[0-9]|6[0245])(?:[ -]?\d){11,17}(?![\w]|[.,-]\d)"
)  # the first digits of the networks in use
CARD_LENGTHS = range(13, 20)
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?![A-Za-z0-9])")
IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\w)")
IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")


@dataclass(frozen=True)
class Found:
    """One piece of sensitive text, characters ``start`` to ``end`` (exclusive)."""

    start: int
    end: int
    kind: str
    """``email address``, ``telephone number``, …, or the name of a kind of secret."""

    @property
    def secret(self) -> bool:
        return self.kind not in PLACEHOLDERS

    @property
    def placeholder(self) -> str:
        return PLACEHOLDERS.get(self.kind, "<SECRET>")


def find(text: str, language: str = "en") -> list[Found]:
    """All secrets and personal data of `text`, in order, none overlapping another; the first kind to match counts."""
    kept: list[Found] = []
    for found in _candidates(text, language):
        if all(found.end <= other.start or other.end <= found.start for other in kept):
            kept.append(found)
    return sorted(kept, key=lambda found: found.start)


def mask(value: str) -> str:
    """What may be shown of a sensitive `value`: its first two characters and its length."""
    return f"{value[:2]}… ({len(value)} characters)"


def scrub(text: str, language: str = "en") -> str:
    """`text` with a placeholder such as ``<EMAIL>`` for each finding."""
    return replace(text, language, masked=False)


def replace(text: str, language: str, *, masked: bool) -> str:
    """`text` with a placeholder for each finding, or with what :func:`mask` shows of it."""
    pieces, end = [], 0
    for found in find(text, language):
        shown = f"{found.placeholder[:-1]} {mask(text[found.start : found.end])}>" if masked else found.placeholder
        pieces += [text[end : found.start], shown]
        end = found.end
    return "".join([*pieces, text[end:]])


def _candidates(text: str, language: str) -> Iterator[Found]:
    for kind, pattern in _secret_patterns():
        for match in pattern.finditer(text):
            yield Found(match.start(), match.end(), kind)
    if "@" in text:
        for match in EMAIL.finditer(text):
            yield Found(match.start(), match.end(), "email address")
    for match in IPV4.finditer(text):
        if _is_public(match[0]):
            yield Found(match.start(), match.end(), "IP address")
    if text.count(":") > 1:
        for match in IPV6.finditer(text):
            if _is_public(match[0]):
                yield Found(match.start(), match.end(), "IP address")
    if DIGITS.search(text):
        yield from _numbers(text, language)


def _numbers(text: str, language: str) -> Iterator[Found]:
    for match in IBAN.finditer(text):
        words = match[0].split(" ")
        # What follows in capitals looks like a part of it: cut at spaces until the check digits are right.
        for count in range(len(words), 0, -1):
            if _is_iban("".join(words[:count])):
                yield Found(match.start(), match.start() + len(" ".join(words[:count])), "IBAN")
                break
    for match in CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if len(digits) in CARD_LENGTHS and _is_luhn(digits):
            yield Found(match.start(), match.end(), "card number")
    if "+" in text:
        for call in PhoneNumberMatcher(text, None, leniency=Leniency.VALID):
            yield Found(call.start, call.end, "telephone number")
    for region in REGIONS.get(language.partition("-")[0].lower(), ()):
        for call in PhoneNumberMatcher(text, region, leniency=Leniency.STRICT_GROUPING):
            if call.number.country_code == phonenumbers.country_code_for_region(region):
                yield Found(call.start, call.end, "telephone number")


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _is_iban(value: str) -> bool:
    """ISO 13616: the country and check digits behind the rest, letters as numbers, leave 1 modulo 97."""
    moved = value[4:] + value[:4]
    return 15 <= len(value) <= 34 and int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def _is_luhn(digits: str) -> bool:
    """ISO/IEC 7812-1."""
    doubled = [int(digit) * (1 + position % 2) for position, digit in enumerate(reversed(digits))]
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


@cache
def _secret_patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """(kind, pattern) of every secret; the patterns themselves, since ``analyze_string`` yields only their groups."""
    from importlib import import_module

    known: list[tuple[str, re.Pattern[str]]] = []
    for module, name in SECRET_PLUGINS.items():
        plugin = getattr(import_module(f"detect_secrets.plugins.{module}"), name)
        known += [(plugin.secret_type, pattern) for pattern in plugin.denylist]
    return (*known, *((kind, re.compile(pattern)) for kind, pattern in MORE_SECRETS.items()))
