"""Public data sets as they are downloaded, read into rows of a manifest."""
