"""The text side: tokens in, whole characters out."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from moshi_c import CheckpointError, hub
from moshi_c.say import spoken_tokens
from moshi_c.tokenizer import Tokenizer

TINY = hub.packaged_model() / "tokenizer_tiny.model"


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer(TINY)


@pytest.fixture(scope="module")
def with_bytes(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary with byte pieces, so that it can spell any character."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, this is a small vocabulary"] * 20),
        model_writer=out,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.model"
    path.write_bytes(out.getvalue())
    return Tokenizer(path)


def test_text_survives_the_round_trip(tiny: Tokenizer) -> None:
    tokens = tiny.encode("hello the capital of france is paris")
    assert tiny.decode(tokens) == " hello the capital of france is paris"
    assert all(0 <= token < tiny.vocab_size for token in tokens)
    assert tiny.encode("") == []


def test_tokens_that_carry_no_text_print_nothing(tiny: Tokenizer) -> None:
    bos, eos, pad, end_pad = 1, 2, 3, 0
    for token in (bos, eos, pad, end_pad, -1):
        assert tiny.decode([token]) == ""


def test_padding_ids_are_the_models(with_bytes: Tokenizer) -> None:
    token = with_bytes.encode("hello")[0]
    assert with_bytes.decode([token])
    assert Tokenizer(with_bytes.path, padding_id=token).decode([token]) == ""
    assert Tokenizer(with_bytes.path, end_padding_id=token).decode([token]) == ""


@given(text=st.text(max_size=30))
def test_a_character_is_printed_whole(with_bytes: Tokenizer, text: str) -> None:
    stream = with_bytes.detokenizer()
    tokens = with_bytes.encode(text)
    printed = [stream.push(token) for token in tokens]
    printed.append(stream.flush())
    assert "\ufffd" not in "".join(printed).replace("\ufffd", "", text.count("\ufffd"))
    for part in printed:
        part.encode("utf-8")
    expected = sentencepiece.SentencePieceProcessor(str(with_bytes.path)).decode(tokens)
    assert "".join(printed).removeprefix(" ") == expected


def byte_token(tokenizer: Tokenizer, value: int) -> int:
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) == bytes([value]))


def test_broken_bytes_become_a_replacement_character(with_bytes: Tokenizer) -> None:
    euro = [byte_token(with_bytes, value) for value in "€".encode()]
    word = with_bytes.encode("hello")
    stream = with_bytes.detokenizer()
    assert [stream.push(token) for token in euro] == ["", "", "€"]
    assert [stream.push(token) for token in euro[:2]] == ["", ""]
    assert stream.push(word[0]) == "\ufffd" + with_bytes.decode(word[:1])
    stream.push(euro[0])
    assert stream.push(3) == "", "padding does not end a character"
    assert stream.push(euro[1]) == ""
    assert stream.push(euro[2]) == "€"
    stream.push(euro[0])
    assert stream.flush() == "\ufffd"
    stream.push(euro[0])
    stream.reset()
    assert stream.flush() == ""
    assert with_bytes.decode([byte_token(with_bytes, 0x80)]) == "\ufffd"


def test_lone_surrogates_do_not_stop_encoding(with_bytes: Tokenizer) -> None:
    assert with_bytes.decode(with_bytes.encode("a\udc80b")).strip()[0] == "a"


@pytest.mark.parametrize("name", ["empty", "cut", "noise", "text", "flipped"])
def test_a_damaged_file_is_refused(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = TINY.read_bytes()
    damaged = {
        "empty": b"",
        "cut": data[:-1],
        "noise": bytes(range(256)) * 8,
        "text": b"not a model\n" * 30,
        "flipped": bytes(byte ^ (i % 97 == 0) for i, byte in enumerate(data)),
    }[name]
    path = tmp_path / "broken.model"
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"broken\.model is damaged"):
        Tokenizer(path)
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.model could not be read"):
        Tokenizer(tmp_path / "nowhere.model")


def test_forced_words_are_spaced_as_speech(tiny: Tokenizer) -> None:
    tokens = spoken_tokens(tiny, "hello paris", 12.5)
    hello, paris = tiny.encode("hello"), tiny.encode("paris")
    assert tokens[0] == 0
    assert tokens[1 : 1 + len(hello)] == hello
    second = tokens.index(0, 1)
    assert second == max(len(hello) + 2, 5), "five letters take 0.35 s"
    assert set(tokens[1 + len(hello) : second]) == {3}
    assert tokens[second + 1 : second + 1 + len(paris)] == paris
    assert tiny.decode(tokens) == " hello paris"


@given(text=st.text(alphabet="abcde .,!?", max_size=40))
def test_every_word_has_its_frames(tiny: Tokenizer, text: str) -> None:
    tokens = spoken_tokens(tiny, text, 12.5)
    words = [word for word in text.split() if tiny.decode(tiny.encode(word)).strip()]
    assert tokens.count(0) == len(words)
    assert tokens[-1:] in ([], [3])


def test_a_sentence_ends_in_a_pause(tiny: Tokenizer) -> None:
    plain = spoken_tokens(tiny, "hello paris", 12.5)
    paused = spoken_tokens(tiny, "hello. paris", 12.5)
    assert len(paused) > len(plain)


def test_what_cannot_be_spelt_is_told_in_a_short_sentence(tiny: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no 'ω'") as told:
        spoken_tokens(tiny, "hello " + "Ωξ" * 1000, 12.5)
    assert len(str(told.value)) < 200
