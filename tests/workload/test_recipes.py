"""What the recipes are for: a trained model knows more of the text than label frequencies do."""

import pytest
from omegaconf import OmegaConf

from fisher_lab.config import paths
from fisher_lab.config.schema import Config
from fisher_lab.config.workload import ModelConfig
from fisher_lab.workload.build import build


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_a_short_training_beats_the_baseline(config, kind):
    cfg = config(kind, steps=200, lr=1e-2, width=32)
    cfg.model.recipe.batch_size = 4
    record = build(cfg).record["model"]
    assert record["heldout_loss"] < record["baseline_loss"] - 0.1


def test_the_topics_recipe_as_it_is_configured(cache_directory):
    """The one recipe that takes seconds; the others are measured in the documentation."""
    chosen = OmegaConf.load(paths.conf() / "model" / "mlp.yaml")
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), chosen))
    assert isinstance(model, ModelConfig)
    made = build(Config(device="cpu", cache_dir=str(cache_directory), model=model))
    record = made.record["model"]
    assert record["baseline"] == "class frequencies"
    assert record["heldout_loss"] < record["baseline_loss"] - 0.5
    batch = made.batches("train", 1, seed=0)[0]
    assert batch["bag"].shape == (512, 2048)
    assert made.loss_fn is not None
    assert made.loss_fn(made.model(batch["bag"]), batch).shape == (512,)
