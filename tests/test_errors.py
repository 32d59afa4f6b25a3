"""Every error has a documented kind and exit code; `conftest.refused` asks for the rest."""

from __future__ import annotations

import inspect
import re

import pytest
from conftest import DOCUMENTED

from exporter import errors
from exporter.errors import ExportError, UnknownName, nearest


def test_the_page_that_documents_the_errors_has_every_one_with_its_exit_code():
    page = dict(re.findall(r"[├└]── (\w+)\s+(\d)", errors.__doc__))
    raised = {
        name: str(kind.exit_code)
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, ExportError) and kind is not ExportError
    }
    assert page == raised == {name: str(code) for name, code in DOCUMENTED.items()}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_error_is_caught_as_an_export_error_and_as_nothing_else_of_ours(name):
    assert getattr(errors, name).__bases__ == (ExportError,)


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if name != "UnknownName"])
def test_an_error_says_its_sentence_and_keeps_its_hint_apart(name):
    error = getattr(errors, name)("the sentence", hint="type this")
    assert (str(error), error.hint) == ("the sentence", "type this")
    assert getattr(errors, name)("the sentence").hint is None


def test_an_unknown_name_says_what_it_is_not_the_name_of():
    error = UnknownName("runtime", "ort-gpu", ["ort-cpu", "ort-cuda", "tensorrt"])
    assert str(error) == "no runtime named 'ort-gpu'"
    assert error.hint == "did you mean 'ort-cpu' or 'ort-cuda'?"


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("fp23", ["fp32", "int8"], "did you mean 'fp32'?"),
        ("FP32", ["fp32", "int8"], "did you mean 'fp32'?"),
        ("resnet18", ["ResNet18"], "did you mean 'ResNet18'?"),
        ("conv", ["conv1", "conv2", "relu"], "did you mean 'conv2' or 'conv1'?"),
        (
            "conv",
            ["conv1", "conv2", "conv3", "conv4"],
            "did you mean 'conv4', 'conv3' or 'conv2'?",
        ),
        ("zebra", ["int8", "fp32"], "known: fp32, int8"),
        ("", ["int8", "fp32"], "known: fp32, int8"),
        ("fp32", [], "known: none"),
    ],
)
def test_the_nearest_words_are_offered_and_all_of_them_where_none_is_near(name, known, hint):
    assert nearest(name, known) == hint


def test_known_words_may_come_from_a_generator():
    assert nearest("fp31", (word for word in ("fp32", "int8"))) == "did you mean 'fp32'?"
