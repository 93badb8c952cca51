"""One site's steps and figures, without privacy."""
