"""The error family crosses process boundaries unchanged, and its tables have no holes."""

import pickle

import pytest

from cluster import errors

FAMILY = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MetierError)]


@pytest.mark.parametrize("kind", FAMILY)
def test_an_error_survives_pickling(kind: type[errors.MetierError]) -> None:
    error = pickle.loads(pickle.dumps(kind("say what; do that", param="training.epochs")))  # noqa: S301 (our own bytes)
    assert type(error) is kind
    assert (str(error), error.message, error.param) == ("say what; do that", "say what; do that", "training.epochs")


@pytest.mark.parametrize("kind", FAMILY)
def test_every_error_has_a_documented_exit_code_and_an_http_error_status(kind: type[errors.MetierError]) -> None:
    assert kind.exit_code in errors.exit_codes()
    assert kind.exit_code != 0
    assert 400 <= kind.http_status < 600
    assert kind.error_type == ("invalid_request_error" if kind.http_status in (400, 404, 409) else kind.error_type)


def test_an_unknown_model_is_told_apart_from_other_missing_things() -> None:
    assert errors.ModelNotFound.code == "model_not_found"
    assert errors.ModelNotFound.exit_code == errors.NotFound.exit_code
