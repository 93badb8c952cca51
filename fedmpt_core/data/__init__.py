"""Where records come from: manifests, data sets, embedded scenes, partitions and the patch-feature cache."""
