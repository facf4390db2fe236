"""The exceptions: one root, each also the standard type a caller would expect to catch."""

import inspect
import pickle

import pytest

from prune_opd_hf import errors

STANDARD_TYPES = {
    "ConfigError": ValueError,
    "InputError": ValueError,
    "UnsupportedGenerationError": ValueError,
    "VocabularyMismatchError": ValueError,
    "NonFiniteLogitsError": ArithmeticError,
    "MonitorStateError": RuntimeError,
    "FileFormatError": ValueError,
    "PublishError": ValueError,
    "LeakError": ValueError,
    "HubError": OSError,
    "HubAccessError": PermissionError,
}
MEMBERS = dict(inspect.getmembers(errors, inspect.isclass))


@pytest.mark.parametrize("name", sorted(set(MEMBERS) - {"PruneOPDError"}))
def test_every_error_has_the_root_and_a_standard_type(name):
    assert issubclass(MEMBERS[name], errors.PruneOPDError)
    standard = [base for base in MEMBERS[name].__mro__ if base.__module__ == "builtins"]
    assert standard[0] not in (Exception, BaseException, object), f"{name} is no standard type"
    assert issubclass(MEMBERS[name], STANDARD_TYPES.get(name, Exception))
    assert MEMBERS[name].__doc__


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_every_error_keeps_its_message_from_one_process_to_another(name):
    copy = pickle.loads(pickle.dumps(MEMBERS[name]("row 3 is empty")))
    assert type(copy) is MEMBERS[name]
    assert str(copy) == "row 3 is empty"
