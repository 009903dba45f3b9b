"""Sharing an export on the Hugging Face Hub: checks, model card, upload."""
