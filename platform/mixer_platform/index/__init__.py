"""Index: re-embed the catalogue, build FAISS shards, measure their recall, publish."""
