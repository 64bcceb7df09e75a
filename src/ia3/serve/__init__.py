"""One process that serves a model's adapters: `ia3 serve`."""
