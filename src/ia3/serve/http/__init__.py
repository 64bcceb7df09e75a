"""The server's routes, its folder of adapters, and who may do what. It knows nothing of models."""
