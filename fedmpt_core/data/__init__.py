"""Where records come from: manifests, public data sets, embedded scenes, partitions. Pictures and labels, no tower."""
