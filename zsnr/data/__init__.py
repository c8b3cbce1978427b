"""Data: tar shards of images and captions, in webdataset's layout."""
