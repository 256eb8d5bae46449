"""Command lines on which key=value stands among options."""

import argparse

import pytest

from data.common.command_line import is_override, job_words, parse


@pytest.mark.parametrize("words", ["C a.b=1 c==2 --force", "C --force a.b=1 c==2", "--force C a.b=1 c==2", "C a.b=1 --force c==2"])
def test_overrides_stand_anywhere(words: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--force", action="store_true")
    assert vars(parse(parser, words.split())) == {"config": "C", "overrides": ["a.b=1", "c==2"], "force": True}
    assert job_words(words.split()) == ("C", ["a.b=1", "c==2"])


@pytest.mark.parametrize("word", ["run.dir=", "data.val=a/b=c", "x=--y", "größe=1"])
def test_word_with_a_key_is_an_override(word: str) -> None:
    assert is_override(word)


@pytest.mark.parametrize("word", ["runs/a=b.yaml", "=1", "1=2", "--steps=3", "job.yaml", "a b=c"])
def test_path_with_an_equals_sign_is_no_override(word: str) -> None:
    assert not is_override(word)
