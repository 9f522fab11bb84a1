"""The recipes of GLUE and of text, whole, on tiny models and data of the real form: in a plain loop, by overrides."""

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import sklearn.metrics
import torch

from akd_dist.base.errors import RefusedError
from akd_dist.data import hub
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Rows
from akd_dist.distill import teacher
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.jobs.train_students import train_in_process
from akd_dist.jobs.train_teacher import Workspace, ensure_trained, run_in_process, teacher_of
from akd_dist.models.folder import load_card, load_model, read_model
from akd_dist.recipe import HuggingFaceData, Recipe, load_recipe
from akd_dist.storage.reader import open_store
from tests.fleets import chain_of

JOBS = Path(__file__).parents[2] / "jobs"
LENGTH = 24


@dataclass(frozen=True)
class Task:
    """A task of GLUE as its dataset on the hub is."""

    columns: tuple[str, ...]
    names: tuple[str, ...] | None
    """Of the classes, in the order of their ids; None for STS-B, which has numbers."""
    metric: str
    test: str = "validation"
    """The split that the recipe tests on."""


SENTENCES = ("sentence1", "sentence2")
TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), "matthews"),
    "mnli": Task(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "accuracy", "validation_matched"
    ),
    "mrpc": Task(SENTENCES, ("not_equivalent", "equivalent"), "f1"),
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment"), "accuracy"),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), "accuracy"),
    "rte": Task(SENTENCES, ("entailment", "not_entailment"), "accuracy"),
    "sst2": Task(("sentence",), ("negative", "positive"), "accuracy"),
    "stsb": Task(SENTENCES, None, "pearson"),
    "wnli": Task(SENTENCES, ("not_entailment", "entailment"), "accuracy"),
}
SPLITS = {"train": 48, "validation": 30}
FILLERS = ["a", "small", "bird", "sat", "on", "the", "wall"]
CLUES = ["never", "always", "perhaps"]
tasks = pytest.mark.parametrize("name", TASKS)


@pytest.fixture(scope="module", autouse=True)
def one_offline_thread() -> Iterator[None]:
    import huggingface_hub.constants

    for library in (hub.require_extra("transformers").utils.logging, hub.require_extra("datasets")):
        library.disable_progress_bar()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    teacher.forget()


# ---- tiny data of the real form


def examples(task: Task, rows: int, seed: int) -> dict[str, list[Any]]:
    """Texts with a word that mostly tells the class, or how high the number is; class 0 is the rarest."""
    draw = random.Random(f"{task.columns} {task.names} {seed}")
    columns: dict[str, list[Any]] = {name: [] for name in (*task.columns, "label", "idx")}
    for row in range(rows):
        kinds = range(len(task.names or CLUES))
        label = row if row in kinds else draw.choices(kinds, [2 + kind for kind in kinds])[0]
        told = label if draw.random() < 0.9 else draw.choice(kinds)
        for column in task.columns:
            words = draw.choices(FILLERS, k=draw.randint(2, 5))
            columns[column].append(" ".join(draw.sample([*words, CLUES[told]], len(words) + 1)))
        columns["label"].append(label if task.names else round(2.5 * label * draw.uniform(0.8, 1.0), 2))
        columns["idx"].append(row)
    return columns


def a_dataset(task: Task) -> Any:
    """Splits with the columns, types and class names of the real ones."""
    datasets = hub.require_extra("datasets")
    label = datasets.Value("float32") if task.names is None else datasets.ClassLabel(names=list(task.names))
    texts = {column: datasets.Value("string") for column in task.columns}
    features = datasets.Features(texts | {"label": label, "idx": datasets.Value("int32")})
    made = {"train": examples(task, SPLITS["train"], 0), task.test: examples(task, SPLITS["validation"], 1)}
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_dict(columns, features=features) for split, columns in made.items()}
    )


# ---- tiny models of the real form


def a_tokenizer() -> Any:
    """RoBERTa's own, byte-level BPE with its special tokens, of a vocabulary learned from a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator([" ".join(["", *FILLERS, *CLUES])], trainer)
    found = json.loads(learned.to_str())["model"]
    return hub.require_extra("transformers").RobertaTokenizer(
        vocab=found["vocab"], merges=[tuple(merge) for merge in found["merges"]]
    )


def a_config(tokenizer: Any, layers: int, **changes: Any) -> Any:
    return hub.require_extra("transformers").RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH + 2,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,  # so narrow a model learns nothing in a few steps from the usual 0.02
        **changes,
    )


STUDENT = "distilroberta-base"
MODELS = {"roberta-large": 2, "roberta-base": 2, STUDENT: 1}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and three masked language models of random weights, named as the real ones."""
    root, tokenizer = tmp_path_factory.mktemp("pretrained"), a_tokenizer()
    tokenizer.save_pretrained(root / "tokenizer")
    for seed, (name, layers) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        hub.require_extra("transformers").RobertaForMaskedLM(a_config(tokenizer, layers)).save_pretrained(root / name)
    return root


# ---- the recipes, whole


class Run:
    """A recipe from its data to its students, with all that it starts from in one folder."""

    def __init__(self, root: Path, file: Path, overrides: Sequence[str]) -> None:
        self.root = root
        self.cache_root = root / "cache"
        self.recipe: Recipe = load_recipe(file, overrides)
        self.splits = prepare(self.recipe.data, self.cache_root)
        place = Workspace(str(root / "stores"), str(self.cache_root))
        teacher = teacher_of(self.recipe, self.splits)
        self.teacher = str(self.recipe.teacher.weights)
        if teacher is not None:
            self.teacher = ensure_trained(teacher, self.recipe, self.splits, place, run_in_process)
        options = {"store_root": place.store_root, "cache_root": place.cache_root}
        self.cached = cache_in_process(self.recipe, self.teacher, **options)
        self.chain = chain_of(self.cached)
        self.results = train_in_process(
            self.recipe,
            self.chain[0],
            run=root / "run",
            cache_root=place.cache_root,
            assistant=self.chain[-1],
        )

    def said(self, model: str) -> np.ndarray:
        """A model's logits of the test rows."""
        inputs, _ = self.splits.test.read(0, len(self.splits.test))
        logits: np.ndarray = load_model(model)(torch.from_numpy(inputs.copy())).detach().numpy()
        return logits


def of_folders(sources: Path) -> list[str]:
    """Overrides that put local folders where the recipe names those of the hub, and make everything short."""
    model = f"{{kind: huggingface, path: {sources}/%s}}"
    data = [
        f"data.{split}.{key}" for split in ("train", "test") for key in ("name=", "config=", f"path={sources}/data")
    ]
    rates = ["teacher.train", "teacher.assistant", *(f"students.{number}" for number in range(3))]
    return [
        *data,
        "data.train.split=train",
        f"data.text={{kind: huggingface, path: {sources}/tokenizer, length: {LENGTH}}}",
        "device=cpu",
        "cache.batch_rows=32",
        f"teacher.model={model % 'roberta-large'}",
        f"teacher.assistant.model={model % 'roberta-base'}",
        "teacher.train.epochs=3",
        "teacher.train.precision=float32",
        "teacher.assistant.objective.epochs=2",
        *(f"students.{number}.model={model % STUDENT}" for number in range(3)),
        *(f"students.{number}.grid.seed=[0]" for number in range(3)),
        "students.0.objective.stage1_epochs=7",
        "students.0.objective.stage2_epochs=3",
        "students.1.objective.epochs=3",
        "students.2.objective.epochs=10",
        *(f"{one}.optimizer.lr=1e-2" for one in rates),
        *(f"{one}.batch=16" for one in rates),
    ]


def measured(metric: str, labels: np.ndarray, logits: np.ndarray) -> float:
    """The metric by other libraries than ours."""
    if metric == "pearson":
        return float(scipy.stats.pearsonr(logits[:, 0], labels).statistic)
    chosen = logits.argmax(axis=1)
    if metric == "f1":
        return float(sklearn.metrics.f1_score(labels, chosen, pos_label=1))
    of = {"accuracy": sklearn.metrics.accuracy_score, "matthews": sklearn.metrics.matthews_corrcoef}
    return float(of[metric](labels, chosen))


@tasks
def test_a_recipe_of_glue_runs_whole(name: str, pretrained: Path, tmp_path: Path) -> None:
    task, sources = TASKS[name], tmp_path / "sources"
    shutil.copytree(pretrained, sources)
    dataset = a_dataset(task)
    dataset.save_to_disk(sources / "data")
    run = Run(tmp_path, JOBS / "glue" / f"{name}.yaml", of_folders(sources))

    test = run.splits.test
    kind = ("classification", "int64") if task.names else ("regression", "float32")
    assert (test.task, test.labels.dtype.name) == kind
    assert run.recipe.data.primary_metric == task.metric
    assert test.class_names == run.splits.train.class_names == task.names
    assert test.classes == len(task.names or [0])
    np.testing.assert_array_equal(test.labels, np.array(dataset[task.test]["label"], test.labels.dtype))
    check_tokens(test, [dataset[task.test][column][:] for column in task.columns], sources)

    shutil.rmtree(sources)  # what was trained needs nothing of it again
    paths = [run.teacher, run.cached["assistants"][0]["path"], *(result["path"] for result in run.results.values())]
    for label, path in zip([*MODELS, STUDENT, STUDENT], paths, strict=True):
        card = load_card(path)
        assert (card.model.label, card.class_names, card.classes) == (label, task.names, test.classes)
    assert set(run.results) == {f"{STUDENT}-{end}-s0" for end in ("annealing_kd-t7", "takd", "continuation_kd-t10")}
    logits = {name: run.said(result["path"]) for name, result in run.results.items()}
    for student, result in run.results.items():
        assert result["state"] == "done", result["reason"]
        assert logits[student].shape == (len(test), test.classes)
        by_others = measured(task.metric, test.labels, logits[student])
        assert result["test"][task.metric] == pytest.approx(by_others, abs=1e-6)
        assert (result["agreement"] is None) is (task.names is None)
    if task.names:
        assert any(len(set(said.argmax(axis=1))) > 1 for said in logits.values()), "nobody learned anything"


def check_tokens(rows: Rows, texts: list[list[str]], sources: Path) -> None:
    """Ids are those of the tokenizer itself; of a pair `<s> one </s></s> other </s>`, as RoBERTa learned them."""
    tokenizer = hub.require_extra("transformers").AutoTokenizer.from_pretrained(sources / "tokenizer")
    encoded = tokenizer(*texts, padding="max_length", max_length=LENGTH)["input_ids"]
    assert rows.inputs.tolist() == encoded
    told, _, rest = tokenizer.decode(rows.inputs[0]).partition("<pad>")
    assert told == "<s>" + "</s></s>".join(column[0] for column in texts) + "</s>"
    assert not rest.replace("<pad>", "")


# ---- the data of the hub, by name


@tasks
def test_the_data_of_a_recipe_is_read_by_its_name(
    name: str, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` takes a folder of that name for the hub's, so name, configuration and splits are the recipe's own."""
    task = TASKS[name]
    dataset = a_dataset(task)
    if name == "qqp":
        dataset["train"] = with_an_empty_question(dataset["train"], 3)
    a_hub_folder(tmp_path / "nyu-mll" / "glue", name, dataset)
    monkeypatch.chdir(tmp_path)
    overrides = [f"data.text={{kind: huggingface, path: {pretrained / 'tokenizer'}, length: {LENGTH}}}", "device=cpu"]
    if name == "qqp":
        with pytest.raises(RefusedError, match=r"empty text in row 3 of nyu-mll/glue \[train\], column question2"):
            prepare(load_recipe(JOBS / "glue" / "qqp.yaml", [*overrides, "data.train.split=train"]).data, tmp_path)
        overrides.append("data.train.split=train[:3]+train[4:]")
    splits = prepare(load_recipe(JOBS / "glue" / f"{name}.yaml", overrides).data, tmp_path / "cache")
    test = splits.test
    assert len(splits.train) + len(splits.validation) == SPLITS["train"] - (name == "qqp")
    assert test.class_names == task.names
    np.testing.assert_array_equal(test.labels, np.array(dataset[task.test]["label"], test.labels.dtype))
    check_tokens(test, [dataset[task.test][column][:] for column in task.columns], pretrained)


def with_an_empty_question(rows: Any, at: int) -> Any:
    return rows.map(lambda row, number: row | ({"question2": ""} if number == at else {}), with_indices=True)


def a_hub_folder(folder: Path, name: str, dataset: Any) -> None:
    """The files of a dataset on the hub: Parquet by configuration and split, and a card that tells of them."""
    lines = ["configs:"]
    for config, rows in (("another", dataset.rename_columns({"label": "another"})), (name, dataset)):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in rows:
            file = f"{config}/{split}-00000-of-00001.parquet"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            rows[split].to_parquet(folder / file)
            lines += [f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join(["---", *lines, "---", ""]))


def test_two_rows_of_qqp_with_empty_questions_are_left_out() -> None:
    train = load_recipe(JOBS / "glue" / "qqp.yaml").data.train
    assert isinstance(train, HuggingFaceData)
    parts = hub.require_extra("datasets").ReadInstruction.from_spec(train.split).to_absolute({"train": 363_846})
    taken = [row for part in parts for row in range(part.from_, part.to)]
    assert set(range(363_846)) - set(taken) == {310_121, 362_225}
    assert taken == sorted(taken)


# ---- a fine-tuned folder as the teacher


def test_a_fine_tuned_folder_teaches_through_a_store(pretrained: Path, tmp_path: Path) -> None:
    """Of longer texts than the recipe's, and with transformers' own names for its classes."""
    hf, task, sources = hub.require_extra("transformers"), TASKS["mrpc"], tmp_path / "sources"
    shutil.copytree(pretrained, sources)
    dataset = a_dataset(task)
    dataset.save_to_disk(sources / "data")
    tokenizer = hf.AutoTokenizer.from_pretrained(sources / "tokenizer")
    torch.manual_seed(7)
    tuned = hf.RobertaForSequenceClassification(a_config(tokenizer, 2, num_labels=2)).eval()
    for part in (tuned, tokenizer):
        part.save_pretrained(sources / "roberta-large-mrpc")
    assistant = load_recipe(JOBS / "glue" / "mrpc.yaml").teacher.assistant
    assert assistant is not None
    shorter = of_folders(sources)
    overrides = [
        *(one for one in shorter if not one.startswith("teacher.")),
        f"teacher={{weights: {sources / 'roberta-large-mrpc'}, assistant: {assistant.model_dump_json()}}}",
        *(one for one in shorter if one.startswith("teacher.assistant")),
        f"data.text.length={LENGTH - 4}",
    ]
    run = Run(tmp_path, JOBS / "glue" / "mrpc.yaml", overrides)

    texts = [dataset[task.test][column][:] for column in task.columns]
    with torch.no_grad():
        theirs = tuned(**tokenizer(*texts, padding=True, truncation=True, max_length=LENGTH - 4, return_tensors="pt"))
    stored = open_store(run.chain[0]["test"])
    np.testing.assert_allclose(stored.rows(0, 0, stored.num_rows), theirs.logits.numpy(), atol=1e-5)
    assert stored.manifest.identity.teacher == load_card(run.teacher).fingerprint
    shutil.rmtree(sources)
    for result in run.results.values():
        assert result["state"] == "done", result["reason"]
        logits = run.said(result["path"])
        agreed = (logits.argmax(axis=1) == theirs.logits.numpy().argmax(axis=1)).mean()
        assert result["agreement"] == pytest.approx(float(agreed))


# ---- text from nothing


def test_the_recipe_of_text_runs_whole(tmp_path: Path) -> None:
    draw = random.Random(0)
    packages = [draw.choice(["json", "asyncio", "xml"]) for _ in range(60)]
    texts = [f"def f{row}():\n    import {package}" for row, package in enumerate(packages)]
    pq.write_table(pa.table({"text": texts, "package": packages}), tmp_path / "texts.parquet")
    narrow = [f"students.{number}.{change}" for number in (0, 1) for change in ("model.width=8", "grid.seed=[0]")]
    overrides = [
        f"data.train.path={tmp_path / 'texts.parquet'}",
        "data.text.length=48",
        *("teacher.model.width=16", "teacher.model.depth=1", "teacher.train.epochs=2"),
        *narrow,
        "students.1.objective.epochs=2",
    ]
    run = Run(tmp_path, JOBS / "text.yaml", overrides)
    assert run.splits.train.class_names == ("asyncio", "json", "xml")
    assert (run.cached["views"], run.cached["classes"]) == (6, 3)
    (tmp_path / "texts.parquet").unlink()
    assert set(run.results) == {"transformer-8x1-annealing_kd-t6-s0", "transformer-8x1-hard_labels-s0"}
    for result in run.results.values():
        assert result["state"] == "done", result["reason"]
        module, card = read_model(result["path"])
        assert card.class_names == run.splits.train.class_names
        inputs, labels = run.splits.test.read(0, len(run.splits.test))
        chosen = module(torch.from_numpy(inputs.copy())).argmax(dim=1).numpy()
        assert result["test"]["accuracy"] == pytest.approx(float((chosen == labels).mean()), abs=1e-6)
