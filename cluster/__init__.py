"""The floor: configuration, model sources, storage, registry, resources, errors and the Ray connection.

Nothing here imports a room above it (retrieval, training, serving, evaluation, metier).
"""
