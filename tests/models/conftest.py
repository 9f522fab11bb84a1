"""What tests of Hugging Face models share: no hub, and tiny models that somebody trained before."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny_transformers import LENGTH, TINY, library


@pytest.fixture(scope="module")
def offline() -> Iterator[None]:
    import huggingface_hub.constants

    library().utils.logging.disable_progress_bar()  # those of save_pretrained here
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretrained models: RoBERTa and a shallow one, as DistilRoBERTa is, BERT with token types, DistilBERT."""
    hf = library()
    root = tmp_path_factory.mktemp("pretrained")
    roberta = {**TINY, "pad_token_id": 0, "max_position_embeddings": LENGTH + 1, "type_vocab_size": 1}
    models = {
        "roberta": hf.RobertaForMaskedLM(hf.RobertaConfig(**roberta, num_hidden_layers=3)),
        "distilroberta": hf.RobertaForMaskedLM(hf.RobertaConfig(**roberta, num_hidden_layers=2)),
        "bert": hf.BertModel(hf.BertConfig(**TINY, num_hidden_layers=2, max_position_embeddings=LENGTH)),
        "distilbert": hf.DistilBertModel(
            hf.DistilBertConfig(
                vocab_size=40, dim=16, n_heads=2, hidden_dim=32, n_layers=2, max_position_embeddings=LENGTH
            )
        ),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    return root
