"""The monitor inside a training loop: telltale's own, Hugging Face's Trainer, Lightning, and the pipeline's reference."""
