"""OpenAI's API for knowledge as Python objects: files, vector stores, searching them, embeddings, reranking.

A vector store is a knowledge: ``vs_<name>``. One made here gets its documents as files; one made by ``metier index``
is shown with its documents as files and cannot be changed here. Every call takes the principal that asks; what it may
not read is not there for it.

Not covered: HTTP (:mod:`serving.knowledge.routes`), who the principal is, and files and stores that expire.
"""
