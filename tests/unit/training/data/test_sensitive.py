"""Secrets and personal data: found where they are, not where they only look like it, and never shown in full."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.sensitive import find, mask, replace, scrub

KEY = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIEow+/=\n-----END RSA PRIVATE KEY-----"
AWS = "AKIA" + "IOSFODNN7EXAMPLE"
TOKENS = {
    "GitHub Token": "ghp_" + "aB3" * 12,
    "GitHub fine-grained token": "github_pat_" + "a1" * 41,
    "Slack Token": "xoxb-" + "1234-5678-abcdef",
    "Stripe Access Key": "sk_live_" + "a1" * 12,
    "Hugging Face token": "hf_" + "aB" * 17,
    "Google API key": "AIza" + "a1B2c" * 7,
    "API key": "sk-ant-" + "api03-" + "a1" * 20,
    "JSON Web Token": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0." + "dozjgNryP4J3jVmNHl0w5N",
}


def kinds(text: str, language: str = "en") -> list[str]:
    return [found.kind for found in find(text, language)]


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("Write to anna.lee+x@mail.corvane.co.uk.", "Write to <EMAIL>."),
        ("thư đến hòa@ví-dụ.vn nhé", "thư đến <EMAIL> nhé"),
        ("Call +44 20 7946 0958 today", "Call <PHONE> today"),
        ("Call (415) 555-2671 today", "Call <PHONE> today"),
        ("Pay with 4111 1111 1111 1111.", "Pay with <CARD>."),
        ("378282246310005", "<CARD>"),
        ("IBAN GB82 WEST 1234 5698 7654 32 OK", "IBAN <IBAN> OK"),
        ("DE89370400440532013000", "<IBAN>"),
        ("from 8.8.8.8, port 80", "from <IP>, port 80"),
        ("2001:4860:4860::8888", "<IP>"),
        (f"The key is {AWS}!", "The key is <SECRET>!"),
        (f"a\n{KEY}\nb", "a\n<SECRET>\nb"),
        ("git clone https://bob:hunter2hunter@git.corvane.io/x", "git clone https<SECRET>git.corvane.io/x"),
    ],
)
def test_what_is_sensitive_is_found_and_replaced(text: str, scrubbed: str) -> None:
    assert scrub(text) == scrubbed


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens_are_found_whole(kind: str) -> None:
    text = f"use {TOKENS[kind]} here"
    (found,) = find(text)
    assert (found.kind, text[found.start : found.end], found.secret) == (kind, TOKENS[kind], True)


def test_national_numbers_are_looked_for_in_the_countries_of_the_language() -> None:
    text = "Gọi 0912 345 678 hoặc 024 3825 1234"
    assert scrub(text, "vi") == "Gọi <PHONE> hoặc <PHONE>"
    assert kinds(text, "eo") == []


@pytest.mark.parametrize(
    "text",
    [
        "V4H: a motorhome on R4 costs 88.60 crowns up to 7.40 metres.",
        "The ferry leaves at 07:40 and 12:30:45 on 2024-05-17.",
        "Order 4111 1111 1111 1112 and 1234567890123456",  # the check digit is wrong; no network begins with 1
        "GB82 WEST 1234 5698 7654 33",
        "127.0.0.1 and 192.168.0.1 and v1.2.3.4 and 1.2.3.4.5 and 999.1.1.1",
        "Put your password into the field and keep it secret.",
        "APARTMENTS and ACCOMMODATION",
        "user@localhost",
        "Room 2024, extension 4455",
    ],
)
def test_what_only_looks_sensitive_is_left_alone(text: str) -> None:
    assert find(text) == []


def test_findings_do_not_overlap() -> None:
    text = f"https://bob:secretsecret@corvane.io and a@b.co {AWS} 4111111111111111"
    found = find(text)
    assert len(found) == 4
    assert all(left.end <= right.start for left, right in pairwise(found))


def test_a_value_is_never_shown_in_full() -> None:
    assert mask("4111 1111 1111 1111") == "41… (19 characters)"
    assert replace(f"key {AWS}", "en", masked=True) == "key <SECRET AK… (20 characters)>"


def test_a_long_text_is_read_in_reasonable_steps() -> None:
    assert find("a" * 200_000) == find("1.1" * 50_000) == find("a.b" * 50_000 + "@") == []


@given(st.lists(st.sampled_from([*TOKENS.values(), AWS, KEY, "a@b.co", "+442079460958", "://a:b@", "word", ">"])))
def test_what_is_scrubbed_has_nothing_left(parts: list[str]) -> None:
    scrubbed = scrub(" and ".join(parts))
    assert find(scrubbed) == []
    assert scrubbed.count("<") == len([part for part in parts if part not in ("word", ">")])
