"""From web archives to training shards: `python -m data_pipelines CONFIG`."""
