"""The feature cache: images are cut into fixed shards, each teacher writes one Parquet file per shard."""
