"""Data: tar shards of pictures and captions, in webdataset's layout."""
