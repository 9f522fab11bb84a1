"""Text from a terminal: what a language model makes of a prompt, piece by piece, and who cannot."""

import json
from pathlib import Path

import pytest

import akd_dist
from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.cli import main
from akd_dist.data.prompts import prompt_tokenizer
from akd_dist.data.tokenizers import language_tokenizer
from akd_dist.documents.use import GenerationDocument
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import load_model, save_model
from akd_dist.models.generation import Sampling, generate
from akd_dist.models.language import Blocks, LanguageModel
from akd_dist.serve.generating import _pieces
from tests.language_models import saved
from tests.tiny_transformers import library
from tests.tokenizers import CHATML, a_byte_pair_tokenizer, a_tokenizer


def of_bytes(folder: Path, seed: int = 0) -> Path:
    card = ModelCard.of_blocks(
        recipe.CausalLm(width=32, depth=1, heads=2), Blocks(length=64, vocabulary=260, end_of_text=258)
    )
    save_model(folder, build(card, seed), card)
    return folder


def test_bytes_are_continued_by_the_tokens_that_the_model_makes(tmp_path: Path) -> None:
    pieces: list[str] = []
    folder = of_bytes(tmp_path)
    document = GenerationDocument.model_validate(
        akd_dist.generate(folder, "hé", tokens=12, temperature=1.0, seed=4, on_text=pieces.append)
    )
    module = load_model(folder)
    assert isinstance(module, LanguageModel)
    made = list(generate(module, [104, 195, 169], Sampling(12, 1.0, seed=4, end=258), 260))
    speaks = prompt_tokenizer(recipe.ByteText())
    assert document.text == speaks.decode(made) == "".join(pieces)
    assert (document.prompt_tokens, document.tokens) == (3, len(made))
    assert document.ended == ("tokens" if len(made) == 12 else "text")


def test_a_character_is_shown_when_all_its_bytes_are_there() -> None:
    speaks = prompt_tokenizer(recipe.ByteText())
    made: list[int] = []
    text = "aé€😀b"
    assert list(_pieces(text.encode(), speaks, made)) == list(text)
    assert list(_pieces([97, 0xC3], speaks, [])) == ["a", "\ufffd"]
    assert "".join(_pieces([0xFF] * 6, speaks, [])) == "\ufffd" * 6


def test_a_folder_of_transformers_speaks_by_the_tokenizer_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library().utils.logging.disable_progress_bar()
    folder = saved(tmp_path / "model", "llama")
    with pytest.raises(RefusedError, match="nobody knows the tokenizer"):
        akd_dist.generate(folder, "red", tokens=3)
    words = a_tokenizer(tmp_path, [f"word{number}" for number in range(45)])
    given = akd_dist.generate(folder, "word1 word2", tokens=6, temperature=1.0, seed=1, tokenizer=words)
    for path in words.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert akd_dist.generate(folder, "word1 word2", tokens=6, temperature=1.0, seed=1)["text"] == given["text"]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["generate", str(folder), "--prompt", "word1 word2", "--tokens", "6", "--temperature", "1", "--seed", "1"])
    assert capsys.readouterr().out == f"word1 word2{given['text']}\n"
    with pytest.raises(SystemExit, match="0"):
        main(["generate", str(folder), "--prompt", "word1 word2", "--tokens", "6", "--json"])
    assert GenerationDocument.model_validate(json.loads(capsys.readouterr().out)).temperature == 0


def test_a_chat_is_written_by_the_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = a_byte_pair_tokenizer(tmp_path / "tokenizer", template=CHATML)
    text = recipe.HuggingFaceText(path=str(words))
    tokens, speaks = language_tokenizer(text).tokens, prompt_tokenizer(text)
    about = Blocks(length=64, vocabulary=tokens.vocabulary, tokenizer=tokens.tokenizer or "", end_of_text=0)
    card = ModelCard.of_blocks(recipe.CausalLm(width=32, depth=1, heads=2), about)
    save_model(tmp_path / "model", build(card, 0), card)
    written = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    assert speaks.encode_chat("the cat") == speaks._loaded.encode(written, add_special_tokens=False)  # type: ignore[attr-defined]
    chat = akd_dist.generate(tmp_path / "model", "the cat", chat=True, tokens=4, tokenizer=words)
    assert (chat["prompt"], chat["prompt_tokens"]) == ("the cat", len(speaks.encode_chat("the cat")))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(
            [
                "generate",
                str(tmp_path / "model"),
                "--prompt",
                "the cat",
                "--chat",
                "--tokens",
                "4",
                "--tokenizer",
                str(words),
            ]
        )
    assert capsys.readouterr().out == f"{chat['text']}\n"
    with pytest.raises(RefusedError, match="bytes have no chat template"):
        akd_dist.generate(of_bytes(tmp_path / "bytes"), "a", chat=True)
    with pytest.raises(RefusedError, match="the tokenizer has no chat template"):
        akd_dist.generate(tmp_path / "model", "a", chat=True, tokenizer=a_byte_pair_tokenizer(tmp_path / "plain"))


def test_who_cannot_continue_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from akd_dist.data.text import Tokens
    from tests.tiny_transformers import rows

    card = ModelCard.of(recipe.TextTransformer(width=8), rows(), None)
    save_model(tmp_path / "classifier", build(card, 0), card)
    assert isinstance(card.tokens, Tokens)
    for arguments, code, said in (
        (["classifier", "--prompt", "a"], 4, "continues no text"),
        (["bytes", "--prompt", ""], 4, "nothing to continue"),
        (["bytes", "--prompt", "a\udcff"], 4, "the prompt is not UTF-8"),
        (["bytes", "--prompt", "a", "--top-p", "2"], 2, "top_p"),
        (["bytes", "--prompt", "a", "--tokens", "0"], 2, "tokens"),
        (["nowhere", "--prompt", "a"], 4, "is not a model folder"),
        (["bytes"], 2, "--prompt"),
    ):
        of_bytes(tmp_path / "bytes")
        with pytest.raises(SystemExit) as caught:
            main(["generate", str(tmp_path / arguments[0]), *arguments[1:]])
        assert (caught.value.code, said in capsys.readouterr().err) == (code, True), arguments
