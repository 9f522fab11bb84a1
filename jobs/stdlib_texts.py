"""Real text that every machine has, from Python's standard library: passages with the package that each comes from, or
documents for language models, and a tokenizer made of them.

python -m akd_dist.jobs.stdlib_texts texts.parquet
python -m akd_dist.jobs.stdlib_texts documents.parquet --documents --tokenizer tokenizer --vocabulary 4096
python -m akd_dist.jobs.stdlib_texts beginnings.parquet --documents --characters 4000
"""

import itertools
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq

from akd_dist.base.files import replace
from akd_dist.data import hub

PACKAGES = (
    "asyncio",
    "concurrent",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "xml",
)
LINES = 6
LEAST_CHARACTERS = 80
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
LEAST_VOCABULARY = 258
"""256 bytes, the end of text and padding."""


def passages(package: Path) -> Iterator[str]:
    """LINES lines at a time of every module of a package, in the order of their names; blank lines left out."""
    for module in sorted(package.rglob("*.py")):
        lines = iter([line for line in module.read_text("utf-8").splitlines() if line.strip()])
        while passage := "\n".join(itertools.islice(lines, LINES)):
            if len(passage) >= LEAST_CHARACTERS:
                yield passage


def corpus() -> pa.Table:
    """The columns `text` and `package`, each passage once; it depends on the version of Python alone."""
    package_of = {text: package for package in PACKAGES for text in passages(_library() / package)}
    return pa.table({"text": list(package_of), "package": list(package_of.values())})


def documents(characters: int | None = None) -> pa.Table:
    """The column `text`: every module of the packages, and those beside them; it depends on the version of Python
    alone.

    Args:
        characters: how many of each are kept, from its beginning: few tokens are then of many modules.
    """
    library = _library()
    files = [one for package in PACKAGES for one in sorted((library / package).rglob("*.py"))]
    files += sorted(library.glob("*.py"))
    texts = [file.read_text("utf-8", errors="replace")[:characters] for file in files]
    return pa.table({"text": [text for text in dict.fromkeys(texts) if text.strip()]})


def write_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int) -> None:
    """Train a byte-pair tokenizer, and write it as a folder that `transformers` reads: the same bytes each time.

    Args:
        folder: is made where it is not there.
        vocabulary: how many ids it gets at most, LEAST_VOCABULARY at least.

    Raises:
        RefusedError: the library `tokenizers` is not installed.
    """
    tokenizers = hub.require_extra("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": PADDING,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    replace(folder / "tokenizer_config.json", json.dumps(config, indent=2).encode())


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@click.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--documents", "whole", is_flag=True, help="Whole modules for language models, not passages.")
@click.option(
    "--characters",
    type=click.IntRange(1),
    help="Of each module, no more than so many from its beginning; with --documents.",
)
@click.option(
    "--tokenizer",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also train a byte-pair tokenizer on the texts, and write it to this folder.",
)
@click.option(
    "--vocabulary",
    type=click.IntRange(LEAST_VOCABULARY),
    default=4096,
    show_default=True,
    help="Ids of that tokenizer, at most.",
)
def main(path: Path, *, whole: bool, characters: int | None, tokenizer: Path | None, vocabulary: int) -> None:
    """Write the passages to PATH, a Parquet file."""
    if characters is not None and not whole:
        raise click.UsageError("--characters cuts whole modules: give --documents as well")
    table = documents(characters) if whole else corpus()
    pq.write_table(table, path)
    if whole:
        click.echo(f"{path}: {len(table):,} documents, {table.nbytes:,} bytes")
    else:
        click.echo(f"{path}: {len(table):,} passages of {len(PACKAGES)} packages")
    if tokenizer is not None:
        write_tokenizer(tokenizer, table["text"].to_pylist(), vocabulary)
        click.echo(f"{tokenizer}: a byte-pair tokenizer of {vocabulary:,} ids")


if __name__ == "__main__":
    main()
