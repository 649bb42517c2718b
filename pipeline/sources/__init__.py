"""Sources of images: folders, tar shards, Parquet files, and generated sample scenes."""
