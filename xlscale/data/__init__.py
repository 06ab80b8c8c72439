"""Text shards, token shards and the position-addressed stream over them."""
